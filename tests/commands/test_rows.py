"""Rows: every file is read, says where its numbers come from, and becomes commands that exist."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from repae_lite.checkpoints.released import RELEASED
from repae_lite.commands.main import make_parser
from repae_lite.commands.presets import presets_dir
from repae_lite.commands.rows import RECONSTRUCTION, SCALES, STAGES, Plan, read_row, row_names
from repae_lite.commands.train_flags import config_from
from repae_lite.evaluation.protocols import METRICS, PROTOCOLS

ROOT = Path(__file__).resolve().parents[2]
ROWS = [read_row(name) for name in row_names()]
BUILT = [row for row in ROWS if not row.not_built]
RECONSTRUCTIONS = {"psnr", "lpips", "reconstruction_frechet", "spatial_variance", "total_variation"}
SCALES_HERE = [scale for scale in SCALES if scale == "full" or (presets_dir() / f"{scale}.yaml").is_file()]


def named(row):
    return row.name


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_row_says_what_its_numbers_are(row):
    assert row.title and row.source and row.published and re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", row.name)
    steps = row.preset.config.max_train_steps if row.preset else None
    for entry in row.published:
        assert entry.metrics and entry.source and entry.protocol in (None, RECONSTRUCTION, *PROTOCOLS)
        known = RECONSTRUCTIONS if entry.protocol == RECONSTRUCTION else set(METRICS)
        assert entry.metrics.keys() <= known and all(value > 0 for value in entry.metrics.values())
        assert (entry.protocol and entry.guidance) or entry.note or row.not_built, "why it is not known"
        if entry.guidance:
            scale, low, high = entry.guidance
            assert scale >= 1 and 0 <= low < high <= 1
        if steps:
            every = row.preset.config.checkpointing_steps
            assert entry.step is None or (entry.step <= steps and entry.step % every == 0)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_row_says_what_it_costs_how_near_is_near_and_where_it_differs(row):
    differences = re.findall(r"^## (D\d+) ", (ROOT / "DIFFERENCES.md").read_text("utf-8"), flags=re.M)
    assert set(row.differences) <= set(differences)
    assert set(row.released) <= RELEASED.keys()
    if row.not_built:
        assert not row.command and not row.cost and len(row.not_built.split()) > 5
        return
    assert row.command and row.basis and row.cost.basis
    assert all(0 < share < 1 for share in row.tolerance.values())
    assert row.tolerance.keys() <= {metric for entry in row.published for metric in entry.metrics}
    if not row.preset:
        return
    config, hours = row.preset.config, row.cost.gpu_hours
    images, published = config.max_train_steps * config.batch_size, 5.4 * 256 / 8  # REPA's, of XL, an H100's
    if not isinstance(hours, tuple):
        assert "XL" in config.model and "5.4 steps/s" in row.cost.basis
        assert hours == pytest.approx(images / published / 3600, rel=0.01)
        return
    of_one = 1e12 * float(re.match(r"not measured; ([\d.]+) TFLOP an image", row.cost.basis)[1])
    speeds = (0.4 * 989e12, published * 0.770e12)
    assert hours == pytest.approx([images * of_one / speed / 3600 for speed in speeds], rel=0.03, abs=1)


@pytest.mark.parametrize("name", ["repa-b-sdvae", "repae-b-sdvae"])
def test_operations_are_those_that_a_row_names(name, benchmark_script):
    row = read_row(name)
    counted = benchmark_script("operations").flops(row.preset.config)
    assert row.cost.basis.startswith(f"not measured; {counted / 1e12:.2f} TFLOP an image")


@pytest.mark.parametrize("row", [row for row in ROWS if row.starts_from], ids=named)
def test_what_a_row_starts_from_is_a_row_that_trains(row):
    chain = [row]
    while chain[-1].starts_from:
        chain.append(read_row(chain[-1].starts_from))
        assert len({each.name for each in chain}) == len(chain), "a circle"
        assert chain[-1].preset
    for later, earlier in pairwise(chain):
        if later.command in ("train-ldm", "reconstruct"):
            assert earlier.command == "train-repae"


def commands(row, scale, folder, **options):
    """Its commands, each with what the real parser makes of it."""
    plan = Plan(row=row, scale=scale, folder=folder, **options)
    assert [stage.name for stage in plan.stages] == [s for s in STAGES if s in {e.name for e in plan.stages}]
    parser = make_parser()
    return [
        (command, parser.parse_args(list(command.words)))
        for stage in plan.stages
        for command in stage.commands
    ]


@pytest.mark.parametrize("scale", SCALES_HERE)
def test_every_command_is_one_of_this_command_line(scale, tmp_path):
    for row in BUILT:
        found = commands(row, scale, tmp_path)
        configs = [config_from(args) for _, args in found if args.command.startswith("train-")]
        assert len(configs) == bool(row.preset) if scale == "full" else configs or row.name.startswith("rec-")
        for config in configs:
            assert config.resume == "latest" and config.output_dir == str(tmp_path / "exps")
            if scale == "full":
                assert {k: getattr(config, k) for k in row.preset.options} == row.preset.options
        judged = [args.command for _, args in found if args.command in ("evaluate", "reconstruct")]
        assert judged and found[-1][1].command == judged[-1]


def test_each_published_number_that_can_be_drawn_is_drawn_and_judged(tmp_path):
    for row in BUILT:
        found = commands(row, "full", tmp_path)
        drawn = {
            (args.protocol, args.train_steps, args.cfg_scale, args.guidance_low, args.guidance_high)
            for _, args in found
            if args.command == "generate"
        }
        assert drawn == {
            (entry.protocol, entry.step, *entry.guidance)
            for entry in row.expected("full")
            if entry.protocol not in (None, RECONSTRUCTION) and entry.guidance
        }
        vaes = {args.vae_ckpt_path for _, args in found if args.command == "reconstruct"}
        assert bool(vaes) == any(entry.protocol == RECONSTRUCTION for entry in row.expected("full"))
        if vaes and row.preset:  # what it tunes, not what it starts from
            assert vaes == {str(tmp_path / "pretrained" / row.name / f"{row.name}.pt")}


@pytest.mark.parametrize("scale", [scale for scale in SCALES_HERE if scale != "full"])
def test_rows_that_are_the_same_run_at_a_smaller_scale_say_so(scale, tmp_path):
    own = {"exp_name", "vae_latents_name"}
    groups = {}
    for row in BUILT:
        if row.preset:
            plan = Plan(row=row, scale=scale, folder=tmp_path)
            runs = [
                (each.command, *((k, v) for k, v in plan.options(each).items() if k not in own))
                for each in plan.lineage
            ]
            groups.setdefault(tuple(map(tuple, runs)), []).append(row)
    where = "(?:smaller scales|tiny scale)" if scale == "tiny" else "smaller scales"
    for group in groups.values():
        same = [re.search(rf"At the {where} the same run as ([\w-]+)\.", row.note) for row in group]
        assert same.count(None) == 1, [row.name for row in group]
        assert {found[1] for found in same if found} <= {row.name for row in group}


def test_mistakes_in_a_row_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("repae_lite.commands.rows.presets_dir", lambda: tmp_path)
    path = tmp_path / "mine.yaml"
    for text, message in {
        "title: A\nsource: B\nmodel: SiT-B/2": "the row .*mine.yaml trains nothing, but sets 'model'",
        "title: A\nsource: B\ncommand: dance": "has command = 'dance'",
        "title: A\nsource: B\ncommand: train-repae\ntiny: {colour: red}": "sets 'colour', which",
        "title: A\nsource: B\ncommand: train-repae\ntiny: {encoder-depth: x}": "must be of type int",
        "title: A\nsource: B\npublished: [{source: C, metrics: {frechet: much}}]": "published.0.metrics",
        "title: A\nsource: B\ncost: {gpu_hours: many, basis: C}": "has cost.gpu_hours.* = 'many'",
    }.items():
        path.write_text(f"# a row\n{text}\n")
        with pytest.raises(ValueError, match=message):
            read_row("mine")
    with pytest.raises(FileNotFoundError, match="there is no row 'min': did you mean mine"):
        read_row("min")
