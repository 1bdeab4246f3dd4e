"""What came out of a row: the result of a folder, its verification against what was published, and tables.

A result holds the results of `repae evaluate` and `repae reconstruct` with all that tells whether they can be
compared: the row's options, the images it trained on, the steps. A published number and one of ours are
compared only under one protocol; whatever stands between them is said instead.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from repae_lite import __version__
from repae_lite.commands.presets import presets_dir, read_preset
from repae_lite.commands.rows import (
    RECONSTRUCTION,
    SCALES,
    STRICT,
    Plan,
    Row,
    read_row,
    row_names,
)
from repae_lite.evaluation.protocols import Protocol, differences, hash_of, load_protocol
from repae_lite.evaluation.results import SHOWN, Expected, Scale, read_result
from repae_lite.utils.configs import first_fault
from repae_lite.utils.files import read_json, write_text

SCHEMA = 1
RESULT, SECONDS = "result.json", "seconds.json"
MARKERS = ("<!-- made by repae reproduce --tables -->", "<!-- end -->")
VALIDATION_IMAGES = 50_000  # that published reconstructions are of
NOT_RUN, WITHIN, OUTSIDE = "not run", "within tolerance", "outside tolerance"
NOT_JUDGED, NOT_COMPARABLE = "not judged", "not comparable"


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Measured:
    """One drawing of a row, judged; or a VAE's reconstructions.

    Attributes:
        protocol: the name that the row gives, see `Expected`.
        step: of the checkpoint; None where there is one only.
        guidance: scale, low, high.
        result: of `repae evaluate` or `repae reconstruct`: metrics, the whole protocol with its hash,
            checksums of samples and weights, and how the samples were drawn.
    """

    protocol: str
    step: int | None = None
    guidance: tuple[float, float, float] = (1.0, 0.0, 1.0)
    result: dict[str, Any]


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """The images that were trained on: how many, and the SHA-256 of their names."""

    images: int
    names: str


@checked_dataclass(frozen=True, kw_only=True)
class Begun:
    """What a folder was begun with, see `Plan.record`."""

    row: str
    scale: Scale
    steps: int | None
    samples: int | None
    seed: int
    files: dict[str, str]


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Result:
    """What came out of a row, as FOLDER/result.json has it.

    Attributes:
        schema: of the file.
        row: its name.
        scale: "tiny", "mid" or "full".
        plan: what the folder was begun with.
        options: training options by row, this one's and those it starts from.
        seeds: of training, by row; those of samples are in how they were drawn.
        data: None if nothing was trained.
        seconds: by stage, of `repae reproduce`; stages that other programs ran are not there.
        measured: the numbers.
        commit: of the checkout, "+" if it had changes; None outside of one.
        lock: SHA-256 of constraints.txt; None where it is not there.
        hardware: what it ran on.
        processes: that shared the work.
        versions: of Python and packages.
        date: of the result.
        hash: of all the rest.
    """

    schema: int
    row: str
    scale: Scale
    plan: Begun
    options: dict[str, dict[str, Any]]
    seeds: dict[str, int]
    data: Data | None
    seconds: dict[str, float]
    measured: tuple[Measured, ...]
    commit: str | None
    lock: str | None
    hardware: dict[str, Any]
    processes: int
    versions: dict[str, str]
    date: str
    hash: str


# ---------------------------------------------------------------- the result of a folder


def write(plan: Plan) -> Path:
    """Writes FOLDER/result.json from what the stages left in the folder.

    Raises:
        ValueError, FileNotFoundError: numbers are not there yet, or were edited.
    """
    import torch

    from repae_lite.training.run_log import commit
    from repae_lite.utils.devices import gpu_name, gpus

    measured = [
        {
            "protocol": entry.protocol,
            "step": entry.step,
            "guidance": entry.guidance,
            "result": read_result(path),
        }
        for entry, path in plan.results
    ]
    trained = {row.name: replace(row.preset, options=plan.options(row)) for row in plan.trained}
    content = {
        "schema": SCHEMA,
        "row": plan.row.name,
        "scale": plan.scale,
        "plan": plan.record(),
        "options": {name: preset.options for name, preset in trained.items()},
        "seeds": {name: preset.config.seed for name, preset in trained.items()},
        "data": trained_on(plan),
        "seconds": seconds(plan.folder),
        "measured": measured,
        "commit": commit(),
        "lock": _lock(),
        "hardware": {
            "gpus": [gpu_name(i) for i in range(gpus())],
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "processes": plan.processes,
        "versions": {
            "repae_lite": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = plan.folder / RESULT
    write_text(path, json.dumps(content | {"hash": hash_of(content)}, indent=1) + "\n")
    return path


def trained_on(plan: Plan) -> dict[str, Any] | None:
    """How many images a plan trains on, and the SHA-256 of their names; None if it trains nothing.

    Raises:
        FileNotFoundError, ValueError: they are not preprocessed, or their list is damaged.
    """
    if not plan.trained:
        return None
    names = plan.data_dir / "images_h5.json"
    if not names.is_file():
        raise FileNotFoundError(f"{names} does not exist: run stage 01_preprocess")
    text = names.read_bytes()
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise ValueError(f"{names} is no list of images: remove it, and run stage 01_preprocess again")
    return {"images": len(found), "names": hashlib.sha256(text).hexdigest()[:16]}


def _lock() -> str | None:
    path = Path(__file__).resolve().parents[2] / "constraints.txt"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def seconds(folder: Path) -> dict[str, float]:
    """How long stages have taken so far, all their starts together."""
    path = folder / SECONDS
    return read_json(path) if path.is_file() else {}


def add_seconds(folder: Path, stage: str, more: float) -> None:
    """Counts time that a stage has taken."""
    found = seconds(folder)
    found[stage] = round(found.get(stage, 0) + more, 1)
    write_text(folder / SECONDS, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> Result:
    """A result of `repae reproduce`.

    Raises:
        FileNotFoundError, ValueError: nothing there, something else, another schema, or edited since.
    """
    content = read_json(path)
    if not {"schema", "row", "scale", "measured", "hash"} <= content.keys():
        raise ValueError(f"{path} is no result of repae reproduce: give its {RESULT}")
    if content["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {content['schema']!r} and this version reads {SCHEMA}: give the command "
            "that made it again"
        )
    whole, numbers = content["hash"] == hash_of(content), []
    try:
        result = TypeAdapter(Result).validate_python(content)
        for each in result.measured:
            whole = each.result["protocol"]["hash"] == hash_of(each.result["protocol"]) and whole
            numbers += each.result["metrics"].values()
    except ValidationError as errors:
        raise ValueError(f"{path} has {first_fault(errors)}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} holds a number without its protocol: restore it") from None
    if not all(isinstance(value, int | float) for value in numbers):
        raise ValueError(f"{path} holds a metric that is no number: restore it")
    if not whole:
        raise ValueError(f"{path} was edited: it does not have the hash that it gives; restore it")
    return result


# ---------------------------------------------------------------- published and ours


@dataclass(frozen=True)
class Verdict:
    """A published number and ours.

    Attributes:
        expected: the published entry.
        metric: which of its metrics.
        state: "within tolerance"; "outside tolerance"; "not judged", as no run can be by what is known of
            the number; or "not comparable", as this run is not.
        ours: None if it was not measured.
        tolerance: share of the published number.
        why: it is not comparable or not judged.
        record: the protocol of ours.
    """

    expected: Expected
    metric: str
    state: Literal["within tolerance", "outside tolerance", "not judged", "not comparable"]
    ours: float | None = None
    tolerance: float | None = None
    why: str = ""
    record: dict[str, Any] = field(default_factory=dict)


def verify(result: Result, row: Row) -> list[Verdict]:
    """Every published number of the result's scale against the result.

    Raises:
        ValueError: the row is not built.
    """
    plan = Plan(row=row, scale=result.scale, folder=Path())
    reasons = _obstacles(result, plan)
    return [
        verdict
        for expected in row.published
        if expected.scale == result.scale
        for verdict in _judged(expected, result, plan, reasons)
    ]


def _obstacles(result: Result, plan: Plan) -> list[str]:
    """Why none of a result's numbers can be compared with the row's; empty if nothing speaks against it."""
    row, found = plan.row, []
    steps, samples = result.plan.steps, result.plan.samples
    trained = plan.trained
    if steps and trained:
        found.append(f"it trained for {steps:,} steps, not {plan.total_steps(trained[-1]):,}")
    if samples:
        found.append(f"it drew {samples:,} images, fewer than its protocol")
    ignored = {"seed", "micro_batches", *(("max_train_steps", "checkpointing_steps") if steps else ())}
    for each in trained:
        now = json.loads(json.dumps(plan.options(each)))
        then = result.options.get(each.name, {})
        for name in dict.fromkeys([*now, *then]):
            if name not in ignored and now.get(name) != then.get(name):
                found.append(f"{each.name} trained with {name} {then.get(name)!r}, and has {now.get(name)!r}")
    if trained and result.data:
        wanted = (row.preset if result.scale == "full" else read_preset(result.scale)).images
        if result.data.images != wanted:
            found.append(f"it trained on {result.data.images:,} images, not {wanted:,}")
    return found


def _judged(expected: Expected, result: Result, plan: Plan, reasons: list[str]) -> list[Verdict]:
    """The verdicts of one published entry."""
    trained = plan.trained
    step = expected.step or (plan.total_steps(trained[-1]) if trained else None)
    ours = next(
        (
            each
            for each in result.measured
            if (each.protocol, each.guidance) == (expected.protocol, expected.guidance)
            and (result.plan.steps or expected.protocol == RECONSTRUCTION or each.step == step)
        ),
        None,
    )
    record, numbers = (ours.result["protocol"], _numbers_of(ours)) if ours else ({}, {})
    reasons = list(reasons)
    if ours is None:
        reasons.append("it was not drawn")
    else:
        reasons += [f"another protocol ({each})" for each in _unlike(expected, record)]
        side, wanted = ours.result.get("samples", record).get("side"), plan.resolution
        if side != wanted:
            reasons.append(f"its images have {side} pixels, not {wanted}")
    found = []
    for metric, published in expected.metrics.items():
        value = numbers.get(metric)
        tolerance = expected.tolerance.get(metric, plan.row.tolerance.get(metric))
        known = {"ours": value, "tolerance": tolerance, "record": record}
        if not _said(expected):
            state, why = NOT_JUDGED, "its source does not say the whole protocol"
        elif reasons:
            state, why = NOT_COMPARABLE, "; ".join(reasons)
        elif tolerance is None:
            state, why = NOT_JUDGED, "no tolerance is known"
        elif value is None:
            state, why = NOT_COMPARABLE, "it was not measured"
        else:
            state, why = (WITHIN if abs(value - published) <= tolerance * abs(published) else OUTSIDE), ""
        found.append(Verdict(expected, metric, state, why=why, **known))
    return found


def _numbers_of(measured: Measured) -> dict[str, float]:
    """The metrics of a result; of reconstructions also what was measured of their latents."""
    latents = measured.result.get("latents", {})
    return {k: v for k, v in latents.items() if isinstance(v, int | float)} | measured.result["metrics"]


def protocol_of(expected: Expected) -> Protocol:
    """The protocol of a published number, with its guidance."""
    scale, low, high = expected.guidance
    return replace(load_protocol(expected.protocol), cfg_scale=scale, guidance_low=low, guidance_high=high)


def _unlike(expected: Expected, record: dict) -> list[str]:
    """In what the protocol of a result differs from the published one's, as far as that is known."""
    if expected.protocol == RECONSTRUCTION:
        wanted: dict = {
            "kind": "reconstruction",
            "judge": "tiny" if expected.scale == "tiny" else "inception",
        }
        if expected.scale == "full":
            wanted["count"] = VALIDATION_IMAGES
    else:
        wanted = protocol_of(expected).record()
        if wanted["reference"] is None or str(record.get("reference")).startswith(wanted["reference"]):
            wanted.pop("reference")
    known = {name: record.get(name) for name in wanted}
    return differences(json.loads(json.dumps(wanted)), known)


def describe(verdict: Verdict) -> str:
    """A verdict in a line."""
    name, published = shown(verdict.expected, verdict.metric), verdict.expected.metrics[verdict.metric]
    words = f"{name} {published:g} ({where(verdict.expected)}): "
    if verdict.ours is not None:
        change = f", {verdict.ours / published - 1:+.1%}" if published else ""
        words += f"ours {verdict.ours:.4g}{change}; "
    if verdict.tolerance is not None:
        words += f"tolerance {verdict.tolerance:.0%}; "
    return f"{words}{verdict.state}{': ' * bool(verdict.why)}{verdict.why}"


def shown(expected: Expected, metric: str) -> str:
    """A metric's usual name, where Inception is the judge; Fréchet distances of others are no FID."""
    tiny = expected.scale == "tiny" or expected.protocol == "tiny"
    return metric.replace("_", " ") if tiny else SHOWN.get(metric, metric.replace("_", " "))


def where(expected: Expected) -> str:
    """Source and conditions of a published number, in words."""
    words = [expected.source, expected.protocol or "protocol not said", guidance(expected)]
    words += [f"step {expected.step:,}"] if expected.step else []
    words += [expected.note] if expected.note else []
    return ", ".join(word for word in words if word)


def guidance(expected: Expected) -> str:
    """Guidance in words; none where nothing is drawn."""
    if expected.protocol == RECONSTRUCTION:
        return ""
    if expected.guidance is None:
        return "guidance not said"
    scale, low, high = expected.guidance
    return f"guidance {scale:g} on [{low:g}, {high:g}]" if scale != 1 else "no guidance"


# ---------------------------------------------------------------- tables


def checkout() -> Path:
    """The folder reproduce/ of a checkout.

    Raises:
        FileNotFoundError: this is an installed package, which has the presets alone.
    """
    folder = presets_dir().parent
    if folder.name != "reproduce":
        raise FileNotFoundError(
            "notebooks, results and tables of rows are in a checkout of the repository, not in the installed "
            "package: get the repository and install it with pip install -e ."
        )
    return folder


def contributed(folder: Path) -> dict[str, Result]:
    """The results in a folder by their file's name.

    Raises:
        ValueError: see `read`.
    """
    return {path.name: read(path) for path in sorted(folder.glob("*.json"))}


def state(verdicts: Iterable[Verdict]) -> str:
    """What verdicts come to, in one word or two: the worst of them; `NOT_RUN` without any."""
    states = {verdict.state for verdict in verdicts}
    return next((each for each in (OUTSIDE, NOT_COMPARABLE, WITHIN, NOT_JUDGED) if each in states), NOT_RUN)


def tables(results: dict[str, Result]) -> str:
    """All rows in Markdown, a table for each protocol: published, ours, cost and state.

    Args:
        results: by the name of their file in reproduce/results.
    """
    rows = [read_row(name) for name in row_names()]
    judged = {name: verify(result, read_row(result.row)) for name, result in results.items()}
    groups: dict[tuple, list[tuple[Row, Expected]]] = {}
    for row in rows:
        for expected in row.published:
            if _said(expected):
                # what all numbers in a column have in common
                place = -SCALES.index(expected.scale), expected.protocol, row.resolution(expected.scale)
                groups.setdefault((*place, expected.guidance), []).append((row, expected))
    lines = []
    for group in sorted(groups):
        lines += _table(groups[group], results, judged)
    lines += _rest(rows, results)
    return "\n".join(lines)


def _said(expected: Expected) -> bool:
    """Whether a source says how its number was got."""
    return None not in (expected.protocol, expected.guidance)


def _table(entries: list[tuple[Row, Expected]], results: dict[str, Result], judged: dict) -> list[str]:
    first = entries[0][1]
    words = [f"{first.scale.capitalize()} scale", first.protocol, guidance(first)]
    words += [f"{entries[0][0].resolution(first.scale)} pixels"]
    lines = [f"### {', '.join(word for word in words if word)}", ""]
    if first.protocol != RECONSTRUCTION:
        lines += [_described(protocol_of(first)), ""]
    lines += ["| row | step | source | published | ours | cost | state |", "|---|---|---|---|---|---|---|"]
    record: dict = {}
    for row, expected in entries:
        ours, states = [], []
        for name, verdicts in judged.items():
            mine = [each for each in verdicts if each.expected == expected and results[name].row == row.name]
            if not mine:
                continue
            link = f"[{results[name].date}](results/{name})"
            said = state(mine)
            apart = differences(record, mine[0].record) if record and said != NOT_COMPARABLE else []
            if said == NOT_COMPARABLE or apart:
                why = (
                    "another protocol than the first of this table: " + "; ".join(apart)
                    if apart
                    else (next(each.why for each in mine if each.state == NOT_COMPARABLE))
                )
                states.append(f"{NOT_COMPARABLE} ({link}): {why}")
                continue
            record = mine[0].record
            ours.append(
                _numbers(expected, {each.metric: each.ours for each in mine if each.ours is not None})
            )
            states.append(f"{said} ({link})")
        cells = (
            f"`{row.name}`",
            f"{expected.step:,}" if expected.step else "last" if row.preset else "–",
            expected.source + (f" ({expected.note})" if expected.note else ""),
            _numbers(expected, expected.metrics),
            "; ".join(ours) or "–",
            row.hours,
            "; ".join(states) or (f"not built: {row.not_built}" if row.not_built else NOT_RUN),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return [*lines, ""]


def _numbers(expected: Expected, metrics: dict[str, float]) -> str:
    return ", ".join(f"{shown(expected, name)} {value:.4g}" for name, value in metrics.items())


def _described(protocol: Protocol) -> str:
    """A protocol in a sentence, as far as it is known before it is carried out."""
    sampler = "SDE" if protocol.mode == "sde" else f"ODE ({protocol.solver})"
    return (
        f"{protocol.count:,} images, {sampler}, {protocol.steps} steps, labels {protocol.labels}, "
        f"{protocol.to_uint8}; judge {protocol.judge}."
    )


def _rest(rows: list[Row], results: dict[str, Result]) -> list[str]:
    """Rows that stand in no table, and results at scales of which nothing was published."""
    lines = []
    vague = [(row, entry) for row in rows for entry in row.published if not _said(entry)]
    if vague:
        lines += ["### Not judged: the source does not say the whole protocol", ""]
        lines += [
            f"- `{row.name}`: {_numbers(entry, entry.metrics)} ({where(entry)})"
            + f"; not built: {row.not_built}" * bool(row.not_built)
            for row, entry in vague
        ]
        lines.append("")
    silent = [row for row in rows if not row.published]
    if silent:
        lines += ["### Rows without a number", ""]
        lines += [
            f"- `{row.name}`: {row.title} ({row.source}); "
            + (f"not built: {row.not_built}" if row.not_built else NOT_RUN)
            for row in silent
        ]
        lines.append("")
    unlike = {
        name: result
        for name, result in results.items()
        if not any(entry.scale == result.scale for entry in read_row(result.row).published)
    }
    if unlike:
        lines += ["### Results with nothing to compare with", ""]
        for name, result in unlike.items():
            for each in result.measured:
                entry = Expected(
                    metrics=each.result["metrics"],
                    source="",
                    protocol=each.protocol,
                    step=each.step,
                    guidance=each.guidance,
                    scale=result.scale,
                )
                numbers = _numbers(entry, entry.metrics)
                tried = f", {result.plan.samples:,} images" if result.plan.samples else ""
                lines.append(
                    f"- [{name}](results/{name}), {result.scale} scale, {where(entry)}{tried}: {numbers}"
                )
        lines.append("")
    return lines


def with_tables(text: str, made: str) -> str:
    """A README's text with new tables between its markers.

    Raises:
        ValueError: it has no markers.
    """
    head, start, rest = text.partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    if not (start and end):
        raise ValueError(f"the README has no lines {MARKERS[0]} and {MARKERS[1]}: put them back")
    return f"{head}{start}\n\n{made.strip()}\n\n{end}{tail}"
