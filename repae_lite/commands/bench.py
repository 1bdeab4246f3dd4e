"""Measure on this machine: a training step and where its time goes, sampling, the VAE, the data, the metrics.

Prints a table and writes bench.json and bench.png. Networks have random weights, or those that ship with
--vae tiny: times do not depend on them. Without a name it measures a step of train-repae.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

from repae_lite.commands.shared_flags import DEVICE
from repae_lite.commands.train_flags import train_flags
from repae_lite.training.config import COMMANDS
from repae_lite.utils.tables import table_lines

ITEMS = {
    "repae": "a step of train-repae: images on the device, encoder, three updates, moving average",
    "ldm": "a step of train-ldm on cached latents, encoder included, and one on cached targets",
    "vae": "a step of train-vae",
    "sample": "latents by ODE and SDE, without guidance, with it on [0, 0.65] and everywhere",
    "encode": "images to latents",
    "decode": "latents to images",
    "encoder": "images to the vision encoder's tokens",
    "loader": "reading images.h5",
    "preprocess": "photographs to images.h5",
    "evaluate": "the judge's features, and the metrics of 2,000 images",
}
ACTS_ON = {  # what an option changes; the others change nearly everything
    "model": ("repae", "ldm", "sample"),
    "enc_type": ("repae", "ldm", "encoder"),
    "mixed_precision": (*COMMANDS, "encoder"),
    "gradient_checkpointing": COMMANDS,
    "micro_batches": (*COMMANDS, "encoder"),
    "compile": (*COMMANDS, "sample", "encode", "decode"),
    "num_steps": ("sample",),
    "num_workers": ("loader", "preprocess"),
}
EPILOG = f"""What there is: {"; ".join(f"{name}, {about}" for name, about in ITEMS.items())}.

Medians with quartiles. Memory is the most that torch held on a GPU; on a CPU, where every item has a process
of its own, by how much that process grew. FLOPs are those of products, convolutions and attention, as torch
counts them; bytes are what all operations read and write, each by itself, so that with caches more than the
whole copy peak can be reached. Peaks are measured here: a large product, a large copy. --against reference
also runs reproduce/benchmarks/reference_step.py, the official order of a step written plainly, in turns with
ours on the same weights and draws, checks that the losses agree, and times each official way alone; on a CPU
it has a process of its own, since what happens to freed memory is a matter of the process."""
WANTED = (
    "--vae --model --enc-type --resolution --batch-size --mixed-precision --allow-tf32 --compile "
    "--gradient-checkpointing --micro-batches --num-workers"
).split()
TRAINING = {name: given for flags in train_flags("repae").values() for name, given in flags.items()}
TRAINING["--batch-size"] |= {"help": "images of a call (default: 32)"}
TRAINING["--resolution"] |= {"help": "side of the images, pixels (default: 256; 32 with --vae tiny)"}
TRAINING["--compile"] |= {"help": "torch.compile for SiT blocks and VAE; refused where it does not work"}
FLAGS = {
    "what is measured": {
        "what": {
            "nargs": "*",
            "metavar": "WHAT",
            "help": f"{', '.join(ITEMS)}, or all (default: repae)",
        },
        "--against": {
            "choices": ("reference",),
            "help": "measure a plain step in the official order, too, and the ratio; in a checkout only",
        },
        "--no-ways": {"action": "store_true", "help": "with --against: leave out each official way alone"},
    },
    "how": {
        **{name: TRAINING[name] for name in WANTED},
        "--num-steps": {
            "type": int,
            "metavar": "N",
            "help": "of the samplers (default: 50 of the ODE, 250 of the SDE)",
        },
        "--repeats": {"type": int, "default": 5, "metavar": "N", "help": "timed calls (default: 5)"},
        "--warmup": {
            "type": int,
            "default": 2,
            "metavar": "N",
            "help": "calls before, not timed (default: 2)",
        },
        **DEVICE,
    },
    "what is written": {
        "--output-dir": {
            "default": "runs/bench",
            "metavar": "FOLDER",
            "help": "where bench.json and bench.png go (default: runs/bench)",
        },
    },
}
GIB = 2**30


def saves_memory(args: argparse.Namespace, error: BaseException) -> str:
    """What helps when memory runs out."""
    return "try a smaller --batch-size, --model or --resolution, --micro-batches or --gradient-checkpointing"


def run(args: argparse.Namespace) -> None:
    """Measures, prints tables, and writes both files."""
    import json

    import torch

    from repae_lite.evaluation.results import result
    from repae_lite.training import benchmark
    from repae_lite.training.config import OPTIONS
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import write_text
    from repae_lite.utils.locks import writing
    from repae_lite.utils.processes import started_together

    items = list(dict.fromkeys(args.what)) or ["repae"]
    items = list(ITEMS) if items == ["all"] else items
    for name in items:
        if name not in ITEMS:
            raise ValueError(f"there is no {name!r} to measure: choose among {', '.join(ITEMS)}, or all")
    for flag, least in (("repeats", 1), ("warmup", 0), ("num_steps", 2)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}: give {least} or more")
    refuse_idle(args, items)
    if started_together():
        raise ValueError("repae bench is one process's work: start it without accelerate or torchrun")
    reference = reference_module() if args.against else None
    if args.no_ways and not reference:
        raise ValueError("--no-ways shortens --against reference: give that, too, or leave it out")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS and name != "output_dir"}
    device, output = choose_device(args.device), Path(args.output_dir)
    settings = benchmark.Settings(
        benchmark.bench_config(**given),
        device,
        repeats=args.repeats,
        warmup=args.warmup,
        num_steps=args.num_steps,
        progress=True,
    )
    config = settings.config
    if config.micro_batches > config.batch_size:
        raise ValueError(
            f"{config.batch_size} images cannot be cut into {config.micro_batches} micro-batches: lower "
            "--micro-batches"
        )
    if reference:
        benchmark.check_comparable(settings)
    content = {"machine": machine(torch.device(device)), "options": given | {"what": items}}
    content["rows"] = []
    for name in items:
        print(f"measuring {name}", file=sys.stderr)
        content["rows"] += _measured(name, settings)
    content["peaks"] = peaks(torch.device(device), {row["precision"] for row in content["rows"]})
    add_shares(content["rows"], content["peaks"])
    print(report(content))
    if reference:
        print("measuring ours against the reference, then each official way alone", file=sys.stderr)
        content["against"] = benchmark.against(settings, reference, ways=not args.no_ways)
        print(report_against(content["against"]))
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "bench.json", json.dumps(result(content), indent=1) + "\n")
        drawn = chart(content["rows"])
        if drawn:
            drawn.savefig(output / "bench.png", dpi=150)
    print(f"written to {output / 'bench.json'}" + ", with a chart in bench.png" * bool(drawn))


def refuse_idle(args: argparse.Namespace, items: list[str]) -> None:
    """Refuses options that change nothing of what is measured.

    Raises:
        ValueError: the first such option.
    """
    measured = {*items, *(["repae"] if args.against else [])}
    for name, touched in ACTS_ON.items():
        if vars(args).get(name) is not None and not measured & {*touched}:
            raise ValueError(
                f"--{name.replace('_', '-')} changes nothing here: it is for {', '.join(touched)}; measure "
                "one of these, or leave it out"
            )


def reference_module() -> ModuleType:
    """reproduce/benchmarks/reference_step.py of this checkout.

    Raises:
        ValueError: this is an installed package, which has no such file.
    """
    from importlib.util import module_from_spec, spec_from_file_location

    path = Path(__file__).resolve().parents[2] / "reproduce" / "benchmarks" / "reference_step.py"
    if not path.is_file():
        raise ValueError(
            f"--against reference needs reproduce/benchmarks/{path.name}, which an installed package does "
            "not have: run it in a checkout"
        )
    spec = spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measured(name: str, settings: object) -> list[dict]:
    """An item's rows; on a CPU from a process of its own, whose memory is that of the item alone."""
    from repae_lite.training import benchmark

    if settings.device != "cpu":
        return benchmark.measure(name, settings)
    with benchmark.own_process(name) as call:
        return call(benchmark.measure, name, settings)


def machine(device: object) -> dict:
    """What measures, and how busy it is with other work."""
    import os
    import platform

    import torch

    from repae_lite.utils.devices import gpu_properties

    name, _ = gpu_properties(device) or (f"{platform.machine()}, {device.type.upper()}", 0)
    about = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return about | ({"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else {})


def peaks(device: object, precisions: set[str | None]) -> dict:
    """What the device can do at most: FLOPs per second by precision, bytes per second."""
    import torch

    from repae_lite.training.parallel import PRECISIONS
    from repae_lite.utils.measure import copy_peak, matmul_peak

    types = {name: dtype or torch.float32 for name, dtype in PRECISIONS.items() if name in precisions}
    matmul = {name: matmul_peak(device, dtype) for name, dtype in types.items()}
    return {"matmul": matmul, "copy": copy_peak(device)}


def add_shares(rows: list[dict], peaks: dict) -> None:
    """Adds to rows and parts which share of the device's peaks they reach."""
    for row in rows:
        seconds = {None: row["seconds"]["median"]} | {
            name: part.get("seconds") for name, part in row.get("parts", {}).items()
        }
        for name, spent in seconds.items():
            target = row if name is None else row["parts"][name]
            if "flops" in target and spent:
                target["of_matmul_peak"] = target["flops"] / spent / peaks["matmul"][row["precision"]]
                target["of_copy_peak"] = target["bytes"] / spent / peaks["copy"]


# ---------------------------------------------------------------- shown


def report(content: dict) -> str:
    """The rows as a table, the parts of training steps below, and what the peaks are."""
    head = ["", "precision", "median", "quartiles", "images/s", "memory", "GFLOP", "of matmul", "of copy"]
    cells = [head]
    for row in content["rows"]:
        spent = row["seconds"]
        cells.append([
            row["what"],
            {None: "—", "no": "fp32"}.get(row["precision"], row["precision"]),
            _time(spent["median"]),
            f"{_time(spent['low'])} – {_time(spent['high'])}",
            f"{row['images_per_second']:,.4g}",
            "—" if row["memory"] is None else f"{row['memory'] / GIB:.2f} GiB",
            *_work(row),
        ])  # fmt: skip
    lines = ["\n".join(table_lines(cells))]
    for row in content["rows"]:
        parts = row.get("parts", {})
        total = sum(part.get("seconds", 0) for part in parts.values())
        cells = [[f"of a {row['what']}", "mean", "share", "GFLOP", "of matmul", "of copy"]]
        for name, part in sorted(parts.items(), key=lambda entry: -entry[1].get("seconds", 0)):
            spent = part.get("seconds", 0)
            cells.append([name, _time(spent), f"{spent / total:.1%}", *_work(part)])
        lines += ["\n".join(table_lines(cells))] * bool(parts)
    idle = [row for row in content["rows"] if "outside_kernels" in row]
    if idle:
        said = (f"{row['what']} {row['outside_kernels']:.1%}" for row in idle)
        lines.append(f"outside the GPU's kernels and copies: {'; '.join(said)}")
    about, found = content["machine"], content["peaks"]
    busy = f", load {about['load']} when it began" if "load" in about else ""
    products = ", ".join(f"{value / 1e9:,.4g} GFLOP/s ({name})" for name, value in found["matmul"].items())
    lines.append(
        f"{about['device']}, {about['cores']} cores, threads used {about['threads']}{busy}; peaks "
        f"measured here: products {products or 'not needed'}, copies {found['copy'] / 1e9:,.4g} GB/s"
    )
    if any(row["memory"] is None for row in content["rows"]):
        lines.append("memory: neither torch nor the system counts it here")
    lines.append("weights are random, or those of the embedded scale: times do not depend on them")
    return "\n\n".join(lines[:-2]) + "\n\n" + "\n".join(lines[-2:])


def report_against(found: dict) -> str:
    """The comparison with the reference, as lines of text."""
    ratio, values = found["ratio"], found["ratio"]["values"]
    cells = [["", "median", "quartiles", "memory"]]
    for name, spent in found["seconds"].items():
        memory = "—" if found["memory"] is None else f"{found['memory'][name] / GIB:.2f} GiB"
        cells.append(
            [name, _time(spent["median"]), f"{_time(spent['low'])} – {_time(spent['high'])}", memory]
        )
    pairs = " ".join(f"{value:.3f}" for value in values)
    lines = [
        "a step of ours and of the plain official order, in turns on the same weights, images, targets and "
        "draws, encoder left out",
        f"the first step's losses agree to {found['tolerance']:g}, its gradient norms to ten times that",
        *table_lines(cells),
        f"reference / ours: median {ratio['median']:.3f}, range {min(values):.3f} to {max(values):.3f}; pair "
        f"by pair {pairs}",
    ]
    if found["memory"] is None:
        lines.append("memory: only CUDA tells that of each")
    cells = [["what each official way costs alone", "median", "range"]]
    for way, entry in found["ways"].items():
        way = way.replace("_", " ")
        if "idle" in entry:
            cells.append([way, "—", f"not measured: {entry['idle']}"])
        else:
            cost = entry["cost"]
            cells.append(
                [way, f"{cost['median']:+.1%}", f"{min(cost['values']):+.1%} to {max(cost['values']):+.1%}"]
            )
    return "\n".join([*lines, "", *table_lines(cells)])


def chart(rows: list[dict]) -> object | None:
    """Where the time of each training step goes, as bars; None without one."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in rows if "parts" in row]
    if not rows:
        return None
    kinds = {"forward": "#0072B2", "backward": "#E69F00", "": "#7A7A7A"}
    heights = [len({name.partition(",")[0] for name in row["parts"]}) for row in rows]
    figure = Figure(figsize=(8, 0.9 * len(rows) + 0.36 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, row in zip(axes, rows, strict=True):
        spent = {name: 1e3 * part.get("seconds", 0) for name, part in row["parts"].items()}
        bars: dict[str, dict[str, float]] = {}
        for name, milliseconds in spent.items():
            network, _, kind = name.partition(", ")
            bars.setdefault(network, {})[kind] = milliseconds
        order, total = sorted(bars, key=lambda network: sum(bars[network].values())), sum(spent.values())
        for network in order:
            left = 0.0
            for kind, colour in kinds.items():
                ax.barh(network, bars[network].get(kind, 0), left=left, color=colour)
                left += bars[network].get(kind, 0)
            ax.annotate(f" {left / total:.0%}", (left, network), va="center")
        ax.set_title(f"{row['what']}, {row['images']} images: {total:.4g} ms", loc="left", fontweight="bold")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.1)
    axes[-1].set_xlabel("milliseconds")
    handles = [Patch(color=colour, label=kind or "neither") for kind, colour in kinds.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(kinds), frameon=False)
    return figure


def _work(entry: dict) -> list[str]:
    """FLOPs, and shares of the peaks."""
    flops = f"{entry['flops'] / 1e9:,.4g}" if "flops" in entry else "—"
    shares = (entry.get(name) for name in ("of_matmul_peak", "of_copy_peak"))
    return [flops, *("—" if share is None else f"{share:.0%}" for share in shares)]


def _time(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 10 else f"{1e3 * seconds:.4g} ms"
