"""From what a user names to tensors: files, run folders, released sets, diffusers models, Hub ids.

`choose` says which names in a list make up what is asked for. Folders and the Hub differ only in how their
names are listed and their files fetched. A run folder holds args.json and checkpoints/0400000.pt (official)
or checkpoints/0400000/ (ours). A released VAE is NAME.pt, beside it NAME-latents-stats.pt and
NAME-discriminator-ckpt.pt; not every NAME is known beforehand, so files are picked by their endings, and an
ambiguous choice is refused. What a file holds decides how it is read, not its ending. Nothing that is read
here can run code.
"""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from repae_lite.checkpoints.hub import fetch, parse_hub_id
from repae_lite.checkpoints.inside import has_network, network_inside
from repae_lite.checkpoints.official import ALONE, NETWORKS, read_official
from repae_lite.data.latents import STATS
from repae_lite.utils.files import data_small_dir, read_json
from repae_lite.utils.state_dicts import RESTORE, plain_state, read_weights
from repae_lite.utils.weight_files import REMEDY, DamagedFile, is_safetensors, unreadable

SHIPPED = {  # by name and network: the files of data_small
    "tiny": {"vae": "vae.safetensors", "sit": "sit.safetensors"},
    "tiny-e2e": {"vae": "vae_e2e.safetensors"},
    "tiny-e2e-20k": {"vae": "vae_e2e_20k.safetensors", "sit": "sit_e2e_20k.safetensors"},
    "tiny-vae-only": {"vae": "vae_only.safetensors"},
}
OPTIONS = "args.json"
DISCRIMINATOR = "-discriminator-ckpt.pt"
DIFFUSERS_STEM = "diffusion_pytorch_model"  # diffusers splits large weights over several files that begin so
DIFFUSERS = DIFFUSERS_WEIGHTS, DIFFUSERS_CONFIG = f"{DIFFUSERS_STEM}.safetensors", "config.json"
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings of files with weights, the safest first

# Written with seven digits, officially and here; any number of them is read.
_CHECKPOINT = re.compile(r"(checkpoints/(\d+))(\.pt|/[^/]+\.safetensors)")
_NOUNS = {
    "sit": "SiT",
    "vae": "VAE",
    "discriminator": "discriminator",
    "stats": "latent statistics",
    "run": "run",
    "diffusers": "diffusers model",
}
_ELSEWHERE = {
    "vae": "a run with a frozen VAE keeps none, so give the VAE that it was trained on",
    "discriminator": "a run with a frozen VAE has none, nor has one without adversarial loss",
    "sit": "give another checkpoint",
    "stats": "give another checkpoint",
}


# ---------------------------------------------------------------- names


def files_in(folder: Path) -> list[str]:
    """The files of a folder, and of the checkpoints in it if it is a run's, by their names relative to it."""
    patterns = ("*", "checkpoints/*", "checkpoints/*/*")
    names = (name for pattern in patterns for name in glob.glob(pattern, root_dir=folder))
    return [name for name in names if (folder / name).is_file()]


def checkpoints_in(names: Iterable[str]) -> dict[int, str]:
    """Step -> name of the checkpoints among a run folder's names, first to last.

    A checkpoint is "checkpoints/0400000.pt", or "checkpoints/0400000", the folder of safetensors files; of
    one step in both kinds the folder is taken.
    """
    matches = filter(None, map(_CHECKPOINT.fullmatch, sorted(names)))  # the folder after its .pt, so it wins
    found = {int(match[2]): match[0] if match[3] == ".pt" else match[1] for match in matches}
    return dict(sorted(found.items()))


def pick_checkpoint(names: Iterable[str], step: int | None, where: object) -> str:
    """The name of a run's checkpoint at a step, the last one for None.

    Raises:
        FileNotFoundError: the run has no checkpoint, or none at this step.
    """
    found = checkpoints_in(names)
    if not found:
        raise FileNotFoundError(
            f"{where} has no checkpoints yet: give the folder of a run that has saved one"
        )
    if step is not None and step not in found:
        raise FileNotFoundError(
            f"{where} has no checkpoint at step {step}: choose one of {', '.join(map(str, found))}"
        )
    return found[max(found) if step is None else step]


def choose(
    names: Iterable[str],
    which: str,
    where: object,
    *,
    ema: bool = True,
    step: int | None = None,
    remedy: str | None = None,
) -> list[str]:
    """The names that make up what is asked for, the file with its weights first.

    Args:
        names: of files, relative to a folder or a repository.
        which: "sit", "vae", "discriminator" or "stats" (latent statistics, or what holds them: a run's SiT);
            "run" for a whole checkpoint, "diffusers" for a diffusers model.
        where: what to call the place in errors.
        ema: of a run's two SiTs the averaged one.
        step: of a run's checkpoints; the last one for None.
        remedy: what to do when it is not there, or several files could be meant.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: several files could be meant, or a step of what is no run.
    """
    names = set(names)
    if checkpoints_in(names):
        picked = pick_checkpoint(names, step, where)
        prefix, options = f"{picked}/", sorted(names & {OPTIONS})
        if picked in names:  # an official file has everything
            return [picked, *options]
        inside = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        chosen = inside if which == "run" else choose(inside, which, f"{picked} of {where}", ema=ema)
        return [*(prefix + name for name in chosen), *options]
    names -= {"resume.pt"}  # of a checkpoint of ours: optimisers, no network
    if step is not None:
        if OPTIONS in names:
            pick_checkpoint(names, step, where)  # there is none, and it says so
        raise ValueError(_no_steps(step, where))
    ours, sit = names & {f"{network}.safetensors" for network in NETWORKS}, "ema" if ema else "sit"
    for network in {"sit": (sit,), "stats": (sit, "vae")}.get(which, (which,)):
        if f"{network}.safetensors" in ours:
            return [f"{network}.safetensors"]
    forms = {"vae": ("vae", "diffusers"), "stats": ("stats", "diffusers", "vae"), "run": ()}
    for form in forms.get(which, (which,)):
        if found := _released(names - ours, form, where, remedy):
            return found
    if OPTIONS in names and remedy is None:
        pick_checkpoint(names, step, where)  # there is none, and it says so
    hint = _ELSEWHERE.get(which) if ours else "give a file, a run folder or the folder of a released model"
    if split := sorted(name for name in names if name.endswith(".index.json")):
        hint = f"its weights are split over the files that {split[0]} names: save them as one"
    raise FileNotFoundError(f"{where} holds no {_NOUNS[which]}: {remedy or hint}")


def _no_steps(step: int, where: object) -> str:
    return (
        f"--train-steps is {step}, but {where} is no run and has no checkpoints to choose from: leave it out"
    )


def _released(names: set[str], form: str, where: object, remedy: str | None) -> list[str]:
    """The files of a diffusers model; or the file with a discriminator, statistics or other weights."""
    if form == "diffusers":
        return [*DIFFUSERS] if names.issuperset(DIFFUSERS) else []
    ending = {"discriminator": DISCRIMINATOR, "stats": STATS}.get(form)
    found = [
        name
        for name in sorted(names)
        if name.endswith(ending or WEIGHTS)
        and (ending or not name.endswith((STATS, DISCRIMINATOR)))
        and not name.startswith(DIFFUSERS_STEM)
        and "/" not in name
    ]
    if len({Path(name).stem for name in found}) > 1:
        raise ValueError(
            f"{where} holds several files that could be meant ({', '.join(found[:4])}): "
            f"{remedy or 'name one of them'}"
        )
    return sorted(found, key=lambda name: WEIGHTS.index(Path(name).suffix))[:1]


# ---------------------------------------------------------------- files


def resolve(source: str | Path, which: str, *, ema: bool = True, step: int | None = None) -> Path:
    """The file with the weights that a user means, fetched from the Hub if need be.

    Arguments and errors as for `read_model`.
    """
    if not str(source).strip():
        raise ValueError("the source of the weights is empty: give a file, a folder or a Hub id")
    shipped = str(source) in SHIPPED
    if shipped and step is not None:
        raise ValueError(_no_steps(step, source))
    path = _shipped(str(source), which) if shipped else Path(source)
    try:
        if path.is_dir():
            next(path.iterdir(), None)  # a folder that may not be read looks empty to glob
            return path / choose(files_in(path), which, path, ema=ema, step=step)[0]
        there = path.exists()
    except OSError as error:
        if error.errno is None:
            raise
        raise unreadable(path, error) from None
    if there:
        if step is not None:
            raise ValueError(_no_steps(step, source))
        return path
    hub_id = None if isinstance(source, Path) or source.endswith(WEIGHTS) else parse_hub_id(source)
    if hub_id is None or path.parent.exists():
        raise FileNotFoundError(
            f"the weights {source} do not exist: check the path, or give a Hub id as in REPA-E/e2e-vavae"
        )
    return fetch(*hub_id, lambda names: choose(names, which, f"{source} on the Hub", ema=ema, step=step))


def _shipped(name: str, which: str) -> Path:
    files = SHIPPED[name]
    if (file := files.get("vae" if which == "stats" else which)) is None:
        others = ", ".join(other for other, names in SHIPPED.items() if which in names) or "none"
        raise FileNotFoundError(
            f"no {_NOUNS[which]} ships under the name {name}: choose one of those that have one ({others})"
        )
    return data_small_dir() / file


@dataclass(frozen=True)
class ModelFile:
    """A network's weights as they were found.

    Attributes:
        path: the file.
        state: names and tensors.
        header: the metadata of a safetensors file, or the config.json of a diffusers model.
        options: those of the run that made them, such as "path_type"; empty outside of runs.
    """

    path: Path
    state: dict[str, Tensor]
    header: dict
    options: dict


def read_model(source: str | Path, which: str, *, ema: bool = True, step: int | None = None) -> ModelFile:
    """Finds and reads one network of what a source holds.

    Args:
        source: a file, a run folder, a folder with a released set or a diffusers VAE, or a Hub id
            "owner/name[@revision]".
        which: "sit", "vae", "discriminator" or "stats" (latent statistics, or what holds them: a run's SiT).
        ema: of a run's two SiTs the averaged one.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there, or a run without this network.
        ConnectionError: a Hub id that is not cached, without a connection.
        ValueError: not weights, more than weights, several files that could be meant, or an official run
            without this network.
    """
    path = resolve(source, which, ema=ema, step=step)
    try:
        return _read(path, which, ema, _remedy(source, path))
    except DamagedFile as error:
        if Path(source).exists() and (whole := _whole_instead(path, which, ema)):
            raise DamagedFile(error.what, whole) from None
        raise


def _read(path: Path, which: str, ema: bool, remedy: str = REMEDY) -> ModelFile:
    if is_safetensors(path):
        state, header = read_weights(path, remedy=remedy)
        config = path.with_name(DIFFUSERS_CONFIG)
        if path.name == DIFFUSERS_WEIGHTS and config.is_file():
            header = read_json(config)
        state = network_inside(plain_state(state, path), which, path)
        return ModelFile(path, state, header, _run_options(path))
    networks, content = read_official(path, remedy=remedy)
    network = which if which in ("vae", "discriminator") else "ema" if ema else "sit"
    state = networks.get(ALONE) or networks.get(network)
    if state is None:  # other projects name what they train "model"
        state = next(
            (networks[name] for name in ("sit", "ema") if has_network(networks.get(name, {}), which)), None
        )
    if state is None:
        held = ", ".join(sorted(NETWORKS[name] for name in networks)) or "none"
        raise ValueError(f"{path} has no {NETWORKS[network]} (it has {held}): {_ELSEWHERE[which]}")
    state = network_inside(state, which, path)
    return ModelFile(path, state, {}, content.get("args") or _run_options(path))


def _remedy(source: str | Path, path: Path) -> str:
    """What to do about a damaged file, which depends on where it comes from."""
    if str(source) in SHIPPED:
        return RESTORE
    if not Path(source).exists():  # of the Hub: the file that its cache links to
        return f"remove {path.resolve()}, and it is fetched again"
    return "restore it from a copy; no other checkpoint of its run is whole" if _run_of(path) else REMEDY


def _whole_instead(path: Path, which: str, ema: bool) -> str | None:
    """What to do instead of reading a damaged checkpoint: take its run's last whole one, if there is one."""
    run = _run_of(path)
    steps = checkpoints_in(files_in(run)) if run else {}
    for step, name in sorted(steps.items(), reverse=True):
        if run / name in (path, *path.parents):
            continue
        try:
            _read(run / choose(files_in(run), which, run, ema=ema, step=step)[0], which, ema)
        except (OSError, ValueError):
            continue
        return f"the checkpoint of step {step} is whole: give the run folder and --train-steps {step}"
    return None


def _run_of(path: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, or None."""
    return next((folder.parent for folder in path.parents[:2] if folder.name == "checkpoints"), None)


def _run_options(path: Path) -> dict:
    """The options of the run that a checkpoint lies in, from its args.json; empty if it lies in none."""
    run = _run_of(path)
    return read_json(run / OPTIONS) if run and (run / OPTIONS).is_file() else {}
