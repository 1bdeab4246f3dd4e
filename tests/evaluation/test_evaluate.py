"""`repae evaluate` and `compare`: metrics beside independent ones, references, protocols, refusals."""

import json
import math
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import run, weights
from torch.profiler import ProfilerActivity, profile

from repae_lite import load_sit, load_vae
from repae_lite.commands.main import main
from repae_lite.data.datasets import load_embedded
from repae_lite.data.samples import ImageStream
from repae_lite.evaluation.evaluate import Reference, RunJudge, evaluate, load_reference, result_of
from repae_lite.evaluation.features import Features, features_of, load_judge
from repae_lite.evaluation.metrics import (
    feature_stats,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    streamed_stats,
)
from repae_lite.evaluation.protocols import PROTOCOLS, Protocol, load_protocol
from repae_lite.evaluation.reconstruction import open_originals
from repae_lite.evaluation.results import table
from repae_lite.evaluation.self_test import checks
from repae_lite.utils.files import data_small_dir

TINY = PROTOCOLS["tiny"]


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def reference(tmp_path):
    """The first 50 embedded evaluation images."""
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=load_embedded("eval")[0][:50].permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture
def protocol(tmp_path) -> str:
    path = tmp_path / "forty.yaml"
    path.write_text("judge: tiny\nmode: ode\nsteps: 20\ncount: 40\nmetrics: [frechet, precision, recall]\n")
    return str(path)


@pytest.mark.parametrize("row", list(checks(seed=1)), ids=lambda row: row[0])
def test_every_metric_agrees_with_an_independent_computation(row):
    _, ours, independent = row
    assert math.isclose(ours, independent, rel_tol=1e-4, abs_tol=1e-9)


def test_an_independent_computation_that_differs_fails_the_self_test(monkeypatch, capsys):
    monkeypatch.setattr("repae_lite.evaluation.self_test._kernel", lambda a, b: 7.0)
    assert main(["evaluate", "--self-test"]) == 2
    assert "these differ: kernel distance, double sum" in capsys.readouterr().err


def test_streamed_statistics_are_the_statistics():
    x = torch.randn(101, 5) * 3 + 1000  # float32 far from zero
    one, other = streamed_stats(x, block=10), feature_stats(x)
    assert torch.allclose(one.mean, other.mean, rtol=1e-12) and torch.allclose(one.cov, other.cov, rtol=1e-9)


def test_equal_and_near_singular_sets():
    x = torch.randn(30, 4)
    x[:, 3] = x[:, 0]  # rank 3
    assert frechet_distance(streamed_stats(x), streamed_stats(x.clone())) < 1e-6
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    assert abs(kernel_distance(torch.randn(400, 4), torch.randn(400, 4))) < 0.05


def test_blocks_do_not_change_a_result():
    x, y = torch.randn(300, 8), torch.randn(200, 8)
    assert precision_recall(x, y, block=64) == precision_recall(x, y)
    assert math.isclose(kernel_distance(x, y, block=64), kernel_distance(x, y), rel_tol=1e-9)


def test_manifolds_do_not_depend_on_the_origin():
    x, y = torch.randn(60, 8) + 1e4, 1.2 * torch.randn(50, 8) + 1e4
    assert precision_recall(x, y) == precision_recall(x.double() - 1e4, y.double() - 1e4)


def _statistics(x, y, block):
    return streamed_stats(x, block=block)


@pytest.mark.parametrize("metric", [precision_recall, kernel_distance, _statistics])
def test_memory_grows_with_the_block_alone(metric):
    x, y = torch.randn(1200, 128), torch.randn(1000, 128)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        metric(x, y, block=200)
    largest = max(event.self_cpu_memory_usage for event in recorded.events())  # bytes of one tensor
    assert 4 * 200 * 128 <= largest < y.nbytes  # neither N × M numbers nor a copy of the features


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: streamed_stats(x[:1]), "at least 2 samples"),
        (lambda x: streamed_stats(x * math.nan), "NaN or infinity"),
        (lambda x: inception_score(x), "class probabilities"),
        (lambda x: precision_recall(x, x[:3]), "more than 3 each"),
        (lambda x: precision_recall(x, x[:, :2]), "of one width"),
        (lambda x: kernel_distance(x, x * math.inf), "NaN or infinity"),
    ],
)
def test_features_that_make_no_sense_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(torch.randn(9, 4))


def test_images_are_read_from_npz_folders_and_h5(tmp_path, images):
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    for number, image in enumerate(images):
        path = tmp_path / "folder" / str(number % 2) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for name in ("plain.npz", "small.npz"):
        stream = ImageStream(tmp_path / name)
        assert (stream.count, stream.side) == (40, 32)
        assert np.array_equal(np.concatenate(list(stream.batches(7))), images)
    stream = ImageStream(tmp_path / "folder")
    assert np.array_equal(
        np.concatenate(list(stream.batches(7))), np.concatenate([images[::2], images[1::2]])
    )
    assert ImageStream(data_small_dir() / "eval").count == 2000


def test_a_folder_without_class_folders_is_read(tmp_path, images, protocol, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    assert np.array_equal(np.concatenate(list(ImageStream(folder).batches(7))), images)
    reference = _saved(tmp_path / "same.npz", arr_0=images)
    words = ["--samples", str(folder), "--reference", str(reference), "--protocol", protocol, "--foreign"]
    assert main(["evaluate", *words, "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "flat-forty.json").read_text())["metrics"]
    assert metrics["frechet"] < 1e-6 and metrics["precision"] == metrics["recall"] == 1
    capsys.readouterr()
    originals = open_originals(folder, 32)  # what repae reconstruct reads
    assert np.array_equal(
        torch.stack([originals[i][0] for i in range(40)]).permute(0, 2, 3, 1).numpy(), images
    )


def _bad_npz(tmp_path, kind, images):
    path = tmp_path / "bad.npz"
    if kind == "float":
        np.savez(path, arr_0=images.astype(np.float32))
    elif kind == "first channel":
        np.savez(path, arr_0=images.transpose(0, 3, 1, 2))
    elif kind == "another name":
        np.savez(path, images=images)
    elif kind == "one":
        np.savez(path, arr_0=images[:1])
    elif kind == "not square":
        np.savez(path, arr_0=images[:, :16])
    elif kind == "objects":
        np.savez(path, arr_0=np.array([None], dtype=object))
    elif kind == "cut":
        np.savez(path, arr_0=images)
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "short":  # the archive is whole, and its array promises more images than it has
        np.savez(path, arr_0=images)
        with zipfile.ZipFile(path) as archive:
            data = archive.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", data[:-5000])
    else:
        path.write_bytes(b"not an archive")
    return path


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("float", "images are uint8"),
        ("first channel", "images are uint8"),
        ("another name", r"not a whole \.npz with the images arr_0"),
        ("one", "at least 2"),
        ("not square", "must be square"),
        ("objects", "images are uint8"),
        ("cut", r"not a whole \.npz"),
        ("short", "ends after image 38"),
        ("text", r"not a whole \.npz"),
    ],
)
def test_a_bad_npz_is_refused_in_one_sentence(tmp_path, images, protocol, reference, capsys, kind, sentence):
    path = _bad_npz(tmp_path, kind, images)
    words = ["--protocol", protocol, "--reference", str(reference), "--foreign", "--device", "cpu"]
    assert main(["evaluate", "--samples", str(path), *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("repae evaluate")]
    assert len(error) == 1
    with pytest.raises(ValueError, match=sentence):
        list(ImageStream(path).batches(16))


def test_a_result_has_its_protocol_inside(tmp_path, images, protocol, reference, capsys):
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=images)
    words = ["evaluate", "--samples", str(samples), "--protocol", protocol, "--device", "cpu"]
    words += ["--reference", str(reference), "--feature-cache", str(tmp_path / "cache")]
    assert main(words) == 2
    assert "nobody knows how it was drawn" in capsys.readouterr().err
    assert main([*words, "--foreign", "--output", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["protocol"]["hash"] in printed
    assert "FID" not in printed  # the distance of another judge is none
    judge = load_judge("tiny")
    features = features_of(ImageStream(samples), judge)
    stats = load_reference(reference, judge).stats["pooled"]
    expected = frechet_distance(feature_stats(features.values["pooled"]), stats)
    assert math.isclose(result["metrics"]["frechet"], expected, rel_tol=1e-9)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    assert main([*words, "--foreign", "--output", str(tmp_path / "b.json")]) == 0  # from the cache
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == result["metrics"]
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out.count("protocol forty") == 1  # two rows, one protocol


def test_results_of_different_protocols_are_not_compared(tmp_path, images, protocol, reference, capsys):
    samples = tmp_path / "samples.npz"
    np.savez(samples, arr_0=images)
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "forty.yaml").read_text() + "neighbours: 5\n")
    words = [
        "evaluate",
        "--samples",
        str(samples),
        "--reference",
        str(reference),
        "--foreign",
        "--device",
        "cpu",
    ]
    for name in (protocol, str(other)):
        assert main([*words, "--protocol", name]) == 0
    paths = [str(tmp_path / f"samples-{name}.json") for name in ("forty", "other")]
    assert main(["compare", *paths]) == 2
    assert "different protocols and cannot be compared: neighbours: 3, 5" in capsys.readouterr().err
    edited = json.loads((tmp_path / "samples-other.json").read_text())
    edited["protocol"]["neighbours"] = 3
    (tmp_path / "samples-other.json").write_text(json.dumps(edited))
    assert main(["compare", *paths]) == 2
    assert "was edited" in capsys.readouterr().err


def test_samples_drawn_by_another_protocol_are_refused():
    sampling = {
        name: getattr(TINY, name) for name in ("mode", "solver", "steps", "labels", "count", "to_uint8")
    }
    guidance = {"cfg_scale": 2.5, "guidance_low": 0.0, "guidance_high": 0.7}
    assert TINY.with_sampling(sampling | guidance).cfg_scale == 2.5
    with pytest.raises(ValueError, match="the samples have labels 'random', and the protocol 'balanced'"):
        TINY.with_sampling(sampling | guidance | {"labels": "random"})


def test_random_and_balanced_labels_are_two_protocols():
    records = [PROTOCOLS[f"adm-sde250-{kind}"].record() for kind in ("random", "balanced")]
    assert records[0]["hash"] != records[1]["hash"]
    with pytest.raises(ValueError, match="unknown protocol 'adm'"):
        load_protocol("adm")
    for changes in ({"metrics": ("fid",)}, {"judge": "tiny"}):
        with pytest.raises(ValueError, match="metrics are"):
            Protocol(**changes)


def test_a_protocol_file_without_metrics_has_those_of_its_judge(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("judge: tiny\ncount: 40\n")
    assert load_protocol(str(path)).metrics == TINY.metrics
    path.write_text("count: 40\n")
    assert load_protocol(str(path)).metrics == Protocol().metrics
    path.write_text("judge: vgg\n")
    with pytest.raises(ValueError, match="judge is 'vgg': choose"):
        load_protocol(str(path))


def _features(count: int, side: int = 32, contrast: float = 60.0) -> Features:
    values = {"pooled": torch.randn(count, 6), "probabilities": torch.full((count, 10), 0.1)}
    return Features(values, "0" * 64, side, contrast)


def _reference(**changes) -> Reference:
    x = torch.randn(30, 6)
    given = {
        "stats": {"pooled": feature_stats(x)},
        "features": x,
        "content": "a" * 64,
        "side": 32,
        "images": 30,
    }
    return Reference(**given | {"contrast": 60.0} | changes)


@pytest.mark.parametrize(
    ("samples", "reference", "changes", "sentence"),
    [
        (_features(39), _reference(), {}, "39 samples and the protocol has 40"),
        (_features(40, 64), _reference(), {}, "64 pixels and the reference has 32"),
        (_features(40), _reference(features=None), {"metrics": ("recall",)}, "statistics only"),
        (_features(40), _reference(), {"metrics": ("spatial_frechet",)}, "needs spatial features"),
        (_features(40), _reference(), {"reference": "bb"}, "wants bb"),
    ],
)
def test_what_does_not_fit_together_is_refused(samples, reference, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(samples, reference, Protocol(**{"count": 40, "metrics": ("frechet",)} | changes))


def test_samples_of_another_contrast_are_told(caplog):
    evaluate(_features(40, contrast=20.0), _reference(), Protocol(count=40, metrics=("frechet",)))
    assert "brought back to the VAE's scale" in caplog.text
    judge = load_judge("tiny")
    given = {"name": "x", "samples": _features(40, contrast=20.0), "judge": judge, "manifest": None}
    found = result_of({"frechet": 1.0}, Protocol(count=40), reference=_reference(), **given)
    assert "vary by 20.0 grey levels and the reference's by 60.0" in table({"x": found})


def test_adms_reference_file(tmp_path, images):
    judge = load_judge("inception-random")
    features = features_of(ImageStream(_saved(tmp_path / "whole.npz", arr_0=images[:12])), judge)
    stats = {kind: feature_stats(features.values[kind]) for kind in ("pooled", "spatial")}
    arrays = {"mu": stats["pooled"].mean, "sigma": stats["pooled"].cov}
    arrays |= {"mu_s": stats["spatial"].mean, "sigma_s": stats["spatial"].cov}
    path = _saved(tmp_path / "adm.npz", arr_0=images[:8], **{name: x.numpy() for name, x in arrays.items()})
    reference = load_reference(path, judge)
    assert reference.images == 8 and reference.side == 32
    assert {kind: len(s.mean) for kind, s in reference.stats.items()} == {"pooled": 2048, "spatial": 2023}
    assert torch.equal(reference.stats["spatial"].cov, stats["spatial"].cov)
    metrics = ("inception_score", "precision", "recall")
    found = evaluate(features, reference, Protocol(count=12, judge="inception-random", metrics=metrics))
    assert found["recall"] == 1 and 1 <= found["inception_score"] < 1.01
    with pytest.raises(ValueError, match="the judge is tiny-evaluator"):
        load_reference(path, load_judge("tiny"))
    bare = _saved(tmp_path / "bare.npz", **{name: x.numpy() for name, x in arrays.items()})
    assert load_reference(bare, judge).features is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mu": np.full(20, np.nan)}, "sigma beside mu in .*NaN or infinity"),
        ({"mu_s": np.full(10, np.inf)}, "sigma_s beside mu_s in .*NaN or infinity"),
        ({"mu": np.full(20, "text")}, "makes no statistics .*<U4"),
        ({"sigma": None}, "sigma beside mu in .* is missing"),
        ({"sigma": np.triu(np.ones((20, 20)))}, "not symmetric"),
        ({"sigma": -np.eye(20)}, "negative eigenvalues"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "statistics of 9 Inception features"),
        ({"mu_s": np.zeros(9), "sigma_s": np.eye(9)}, "mu_s in .* is of 9 features"),
        ({"mu_s": None}, "spatial_frechet needs spatial features"),
        ({"arr_0": None}, "need images in the reference"),
        ({"arr_0": np.zeros((8, 64, 64, 3), np.uint8)}, "32 pixels and the reference has 64"),
        ({"arr_0": np.zeros((8, 32, 32, 3), np.float32)}, "images are uint8"),
        ({"arr_0": np.zeros((3, 32, 32, 3), np.uint8)}, "the reference has 3 images"),
    ],
)
def test_a_bad_reference_is_refused_before_images_are_judged(tmp_path, monkeypatch, changes, sentence):
    monkeypatch.setattr("repae_lite.evaluation.evaluate.WIDTHS", {"pooled": 20, "spatial": 10})

    class Judge:
        name, side = "inception-that-must-not-run", None

    arrays = {"mu": np.zeros(20), "sigma": np.eye(20), "mu_s": np.zeros(10), "sigma_s": np.eye(10)}
    arrays |= {"arr_0": np.zeros((8, 32, 32, 3), np.uint8)} | changes
    path = _saved(tmp_path / "adm.npz", **{name: x for name, x in arrays.items() if x is not None})
    with pytest.raises(ValueError, match=sentence):
        load_reference(path, Judge(), protocol=Protocol(), side=32)


def _saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_weights_that_are_not_here_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth: get them once from http"
    ):
        load_judge("inception")
    with pytest.raises(ValueError, match="unknown judge"):
        load_judge("vgg")


@pytest.mark.network
def test_published_values_of_admnet(tmp_path):
    """Needs Inception's weights, and in ADM_FILES the samples and the reference below.

    ADM's repository, openai/guided-diffusion, links both in evaluations/README.md.
    """
    import os
    from pathlib import Path

    folder = Path(os.environ.get("ADM_FILES", "adm"))
    samples, reference = (
        folder / name
        for name in ("admnet_guided_upsampled_imagenet256.npz", "VIRTUAL_imagenet256_labeled.npz")
    )
    if not samples.is_file() or not reference.is_file():
        pytest.skip(f"{samples} and {reference} are not here: set ADM_FILES")
    judge = load_judge("inception")
    stream = ImageStream(samples)
    found = evaluate(
        features_of(stream, judge), load_reference(reference, judge), Protocol(count=stream.count)
    )
    # TensorFlow's, and in brackets those of a PyTorch port: PAPER's evaluation facts.
    for metric, published, port in (
        ("frechet", 3.94256, 3.94103),
        ("spatial_frechet", 6.14043, 6.14049),
        ("inception_score", 215.837, 215.976),
        ("precision", 0.8265, 0.82548),
        ("recall", 0.5309, 0.5285),
    ):
        assert abs(found[metric] - published) <= max(2 * abs(published - port), 1e-3 * published), metric


def test_a_run_that_could_not_be_judged_does_not_start(tmp_path):
    changes = {"eval_every": 3, "eval_samples": 55, "eval_protocol": "tiny"}
    with pytest.raises(ValueError, match="55 images cannot be shared equally by 10 classes"):
        run(tmp_path, "judged", **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 3}, "need at least 4 images"),
        ({"count": 1, "metrics": ("frechet",)}, "need at least 2 images"),
        ({"chunk": 0}, "chunk is 0"),
        ({"precision": "float16"}, "precision is 'float16': the only one"),
    ],
)
def test_protocols_without_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Protocol(**changes)


def test_names_keep_their_dots_and_results_of_one_name_both_stand(
    tmp_path, images, protocol, reference, capsys
):
    for number in ("0.65", "0.7"):  # as in run_0000400_cfg2.2-0.0-0.65, a folder
        (tmp_path / number).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / number / f"{i:02d}.png")
        words = ["evaluate", "--foreign", "--samples", str(tmp_path / number), "--reference", str(reference)]
        assert main([*words, "--protocol", protocol]) == 0
    one, two = (tmp_path / f"{number}-forty.json" for number in ("0.65", "0.7"))
    other = tmp_path / "0.65" / one.name
    other.write_bytes(two.read_bytes())
    capsys.readouterr()
    assert main(["compare", str(one), str(other)]) == 0
    shown = capsys.readouterr().out
    assert str(one) in shown and str(other) in shown


def test_a_run_is_judged_while_it_trains(tmp_path, caplog):
    changes = {"eval_every": 3, "eval_samples": 20, "eval_protocol": "tiny"}
    folder = run(tmp_path, "judged", **changes)
    found = {line["step"]: line for line in folder.metrics() if "eval_frechet" in line}
    assert sorted(found) == [3, 6]
    sit, vae = load_sit(folder.path), load_vae(folder.path)
    protocol = replace(TINY, count=20)
    judge = RunJudge(protocol, None, torch.device("cpu"))
    again = judge(sit, vae, seed=0, path_type="linear")
    said = {"eval_protocol": "tiny", "eval_protocol_hash": judge.record["hash"]}
    assert said.items() <= found[6].items()
    assert math.isclose(again["frechet"], found[6]["eval_frechet"], rel_tol=1e-3)
    plain = run(tmp_path, "plain")  # judging draws nothing that training would have drawn
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(folder)[name])
    run(tmp_path, "judged", **changes | {"max_train_steps": 7, "eval_samples": 10}, resume="latest")
    assert f"evaluations by protocol tiny {said['eval_protocol_hash']}, and from here on by" in caplog.text
