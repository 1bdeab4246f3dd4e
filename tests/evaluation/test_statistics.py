"""Statistics over seeds against numpy and scipy."""

import math

import numpy as np
import pytest
import scipy.stats

from repae_lite.evaluation.statistics import difference_interval, seed_spread


def test_seed_spread():
    assert seed_spread([1, 2, 3, 6]) == (3, pytest.approx(np.std([1, 2, 3, 6], ddof=1)), 4)
    assert math.isnan(seed_spread([2.0]).std) and str(seed_spread([2.0])) == "2 (n = 1)"
    assert str(seed_spread([1.0, 3.0])) == "2 ± 1.4 (n = 2)"
    with pytest.raises(ValueError, match="1 or more finite values"):
        seed_spread([])


@pytest.mark.parametrize("paired", [True, False])
def test_difference_interval_agrees_with_scipy(paired):
    a, b = [12.1, 12.9, 11.7, 12.4, 12.2], [13.0, 13.4, 12.9, 13.1, 12.2]
    found = difference_interval(a, b, level=0.9, paired=paired)
    test = scipy.stats.ttest_rel(a, b) if paired else scipy.stats.ttest_ind(a, b, equal_var=False)
    expected = test.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.excludes_zero == (test.pvalue < 0.1)
    default, expected = difference_interval(a, b, paired=paired), test.confidence_interval(0.95)
    assert (default.low, default.high) == pytest.approx((expected.low, expected.high))


def test_difference_interval_verdicts_and_errors():
    assert "inside the noise" in str(difference_interval([1.0, 2.0, 3.0], [1.5, 2.0, 2.6]))
    assert "outside the noise" in str(difference_interval([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]))
    assert not difference_interval([1.0, 1.0], [1.0, 1.0]).excludes_zero
    noisy = [1.0, 2.0, 3.0], [1.5, 2.5, 3.5]  # pairs that differ by exactly 0.5; only pairing can see it
    assert not difference_interval(*noisy).excludes_zero
    assert difference_interval(*noisy, paired=True).excludes_zero
    with pytest.raises(ValueError, match="2 or more finite values"):
        difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="got 2 and 3: use paired=False"):
        difference_interval([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)
    with pytest.raises(ValueError, match="got 95"):
        difference_interval([1.0, 2.0], [1.0, 2.0], level=95)
