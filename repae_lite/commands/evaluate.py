"""Judge generated images by FID, sFID, Inception Score, precision and recall, without TensorFlow.

Samples are an .npz of repae generate or of any other script (arr_0, uint8), or a folder of images. The
reference is ADM's .npz, as VIRTUAL_imagenet256_labeled.npz, or images. Everything that the numbers depend on
is the protocol, which stands in the result with its hash: only results of one hash can be compared (repae
compare).
"""

import argparse
import json
from pathlib import Path

from repae_lite.commands.shared_flags import DEVICE

EPILOG = """Definitions are those of ADM's evaluator: pool_3 for FID, the first seven channels of mixed_6/conv
for sFID, the classifier without its bias in consecutive chunks of 5,000 for the Inception Score, three
neighbours for precision and recall. Inception's weights are TensorFlow's, as ported by torch-fidelity. A
protocol of one's own may list frechet_dinov2 (FD-DINOv2) as well. REPA's usual teacher is a DINOv2 too: for a
run aligned with one, FD-DINOv2 is no independent judge, and the result says so."""
FLAGS = {
    "what is judged": {
        "--samples": {"metavar": "FILE", "help": "an .npz, or a folder of images"},
        "--reference": {
            "metavar": "FILE",
            "help": "ADM's .npz, an .npz of images, or a folder (default: the embedded evaluation images, "
            "for protocol tiny)",
        },
        "--protocol": {
            "metavar": "NAME",
            "help": "adm-sde250-random, adm-sde250-balanced, adm-ode50-random, adm-ode50-balanced, mid, "
            "tiny, or a YAML file with fields of repae_lite.evaluation.protocols.Protocol",
        },
        "--foreign": {
            "action": "store_true",
            "help": "the samples are of another program and do not say how they were drawn: you vouch that "
            "it was by the protocol",
        },
        "--preset": {
            "metavar": "NAME",
            "help": "print what was published for this run, see reproduce/presets, beside the result",
        },
    },
    "how it runs": {
        "--inception": {
            "metavar": "FILE",
            "help": "Inception's weights (default: in torch's cache, where torch-fidelity puts them)",
        },
        "--dinov2": {
            "metavar": "FILE",
            "help": "weights of DINOv2 ViT-L/14, for frechet_dinov2 (default: timm downloads them once)",
        },
        "--feature-cache": {
            "metavar": "FOLDER",
            "help": "keep features here, by the content of images and judge (default: nowhere)",
        },
        **DEVICE,
        "--self-test": {
            "action": "store_true",
            "help": "judge nothing, but print every metric beside an independent computation of it",
        },
    },
    "what is written": {
        "--output": {"metavar": "FILE", "help": "the result as JSON (default: beside the samples)"},
    },
}


def run(args: argparse.Namespace) -> None:
    """Judges, prints the numbers with their protocol, and writes the result."""
    from repae_lite.commands.rows import read_row
    from repae_lite.data.samples import ImageStream
    from repae_lite.evaluation.evaluate import (
        check_samples,
        evaluate,
        load_judges,
        load_reference,
        result_of,
    )
    from repae_lite.evaluation.features import features_of
    from repae_lite.evaluation.protocols import load_protocol
    from repae_lite.evaluation.results import table
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import data_small_dir, write_text

    if args.self_test:
        from repae_lite.evaluation.self_test import report

        print(report())
        return
    if args.samples is None or args.protocol is None:
        raise ValueError("say what is judged and how: give --samples FILE and --protocol NAME")
    protocol, samples = load_protocol(args.protocol), Path(args.samples)
    manifest = samples.with_suffix(".json") if samples.suffix == ".npz" else samples / "manifest.json"
    drawn = None if args.foreign else _manifest(manifest, samples)
    if drawn is not None:
        protocol = protocol.with_sampling(drawn["sampling"])
    stream = ImageStream(samples)
    check_samples(stream.count, protocol)
    if args.reference is None and protocol.judge != "tiny":
        raise ValueError("the protocol needs a reference: give --reference FILE")
    row = read_row(args.preset) if args.preset else None
    judge = load_judges(protocol, inception=args.inception, dinov2=args.dinov2)
    options = {
        "device": choose_device(args.device),
        "cache": Path(args.feature_cache) if args.feature_cache else None,
        "progress": True,
    }
    source = args.reference or data_small_dir() / "eval" / "images.h5"
    reference = load_reference(source, judge, protocol=protocol, side=stream.side, **options)
    features = features_of(stream, judge, label="samples", **options)
    teacher = (drawn or {}).get("enc_type") or (row and row.preset and row.preset.options.get("enc_type"))
    result = result_of(
        evaluate(features, reference, protocol),
        protocol,
        name=Path(args.protocol).stem,
        samples=features,
        reference=reference,
        judge=judge,
        manifest=drawn,
        teacher=teacher,
    )
    title = samples.stem if samples.suffix == ".npz" else samples.name  # of a folder, dots are no suffix
    output = Path(args.output or samples.with_name(f"{title}-{Path(args.protocol).stem}.json"))
    write_text(output, json.dumps(result, indent=1) + "\n")
    print(table({title: result}, row.expected("full") if row else ()))
    print(f"written to {output}")


def _manifest(path: Path, samples: Path) -> dict:
    """How samples were drawn."""
    from repae_lite.utils.files import read_json

    if not path.is_file():
        raise ValueError(
            f"{samples} has no manifest {path.name} beside it, so nobody knows how it was drawn: give "
            "--foreign if you do"
        )
    return read_json(path)
