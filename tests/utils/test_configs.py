"""Configurations from files: the right types and nothing else, and one sentence that names file and field."""

from dataclasses import asdict, dataclass

import pytest

from repae_lite.utils.configs import checked_config


@dataclass(frozen=True)
class Sizes:
    width: int
    levels: tuple[int, ...] = (1, 2)
    rate: float = 0.5
    on: bool = True

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}: it must be at least 1")


def nested(depth: int) -> dict:
    found: dict = {}
    for _ in range(depth):
        found = {"width": found}
    return found


def test_what_was_written_comes_back():
    sizes = Sizes(3, levels=(4,), rate=1.0)
    assert checked_config(Sizes, asdict(sizes), "it") == sizes
    assert checked_config(Sizes, {"width": 3, "rate": 1}, "it") == Sizes(3, rate=1.0)
    assert checked_config(Sizes, {"width": 3, "other": 1}, "it", unknown="ignore") == Sizes(3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": "3"}, r"it has a configuration with width='3' \(.* integer\)"),
        ({"width": True}, "with width=True"),
        ({"width": 3.5}, "with width=3.5"),
        ({"width": 3, "levels": [1, None]}, r"with levels=\[1, None\]"),
        ({"width": 3, "levels": 1}, "with levels=1"),
        ({"width": 3, "rate": "x"}, "with rate='x'"),
        ({"width": 3, "on": 1}, "with on=1"),
        ({"width": 3, "other": 1}, "with other=1"),
        ({"width": object}, "with width=<class 'object'>"),
        ({}, "it has a configuration without width: get it again"),
        ({"width": 0}, "it has an impossible configuration: width is 0: it must be at least 1"),
        ([1], "it has an impossible configuration"),
        (None, "it has an impossible configuration"),
        (nested(100_000), "it has a configuration that is nested too deeply"),
    ],
)
def test_anything_else_is_one_sentence(values, message):
    with pytest.raises(ValueError, match=message) as refusal:
        checked_config(Sizes, values, "it")
    assert len(str(refusal.value).splitlines()) == 1
