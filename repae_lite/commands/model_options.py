"""`repae cache-latents`, `export-vae` and `download`: their options, and what they print.

Names and meanings are those of the official cache_latents.py and save_vae_weights.py. Imports happen when a
command runs.
"""

import argparse
import os
from pathlib import Path

_SOURCES = (
    "an official .pt or our .safetensors; a run folder or a checkpoint in it; a folder of a released set or "
    "of diffusers; or a Hub id, "
    "as in REPA-E/e2e-vavae"
)


# ---------------------------------------------------------------- cache-latents


def add_cache_latents(commands: argparse._SubParsersAction) -> None:
    """The options of `repae cache-latents`."""
    parser = commands.add_parser(
        "cache-latents",
        help="encode all images by a frozen VAE into NAME.h5, for train-ldm",
        description="Encodes every image once and writes NAME.h5 (mean and std of each posterior, float32), NAME_h5.json and "
        "NAME-latents-stats.pt, in the official layout. A run that was interrupted, however it was, goes on "
        "where it stopped when "
        "the same command is given again.",
        epilog="Space: 8 bytes per latent value, 42 GB for ImageNet at 256 pixels and f8d4, 84 GB at f16d32. Under accelerate launch "
        "or torchrun the processes share the work. NAME.h5 keeps the VAE's fingerprint, so that train-ldm "
        "can refuse another VAE's "
        "latents.",
    )
    what = parser.add_argument_group("what is encoded")
    what.add_argument(
        "--vae-ckpt-path", "--vae-ckpt", required=True, metavar="SOURCE", help=f"the VAE: {_SOURCES}"
    )
    what.add_argument(
        "--vae-arch", choices=("f8d4", "f16d32", "tiny"), help="its size (default: what the file tells)"
    )
    what.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="of a run folder the checkpoint at this step (default: the last)",
    )
    what.add_argument(
        "--data-dir",
        default="data",
        metavar="FOLDER",
        help="preprocessed images, or a folder of images (default: data)",
    )
    what.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="side of the images; needed for a folder of images (default: as they are)",
    )
    writing = parser.add_argument_group("what is written")
    writing.add_argument(
        "--vae-latents-name", required=True, metavar="NAME", help="NAME.h5 and the two files beside it"
    )
    writing.add_argument(
        "--output-dir", "--output-path", metavar="FOLDER", help="where they go (default: --data-dir)"
    )
    writing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished NAME.h5, and discard an unfinished one of other images or VAE",
    )
    running = parser.add_argument_group("how it runs")
    running.add_argument(
        "--pproc-batch-size",
        type=int,
        default=128,
        metavar="N",
        help="images at once, in each process (default: 128)",
    )
    running.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="processes that read (default: 0 on a CPU, up to 8 otherwise)",
    )
    running.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)"
    )
    parser.set_defaults(run=cache_latents)


def cache_latents(args: argparse.Namespace) -> None:
    """Writes NAME.h5 and says what came of it."""
    from accelerate import PartialState

    from repae_lite.checkpoints.models import load_vae
    from repae_lite.data.datasets import open_dataset
    from repae_lite.data.latents import CachedLatentsDataset, cache_latents
    from repae_lite.networks.vae import VAE_PRESETS
    from repae_lite.utils.files import check_name

    name = args.vae_latents_name
    check_name(name, "--vae-latents-name")
    if name == "images":
        raise ValueError(
            "--vae-latents-name is 'images', and images.h5 holds the images themselves: choose another name"
        )
    if args.pproc_batch_size < 1:
        raise ValueError(f"--pproc-batch-size is {args.pproc_batch_size}: give at least 1")
    if args.num_workers is not None and args.num_workers < 0:
        raise ValueError(f"--num-workers is {args.num_workers}: give at least 0, or leave it out")
    device = _device(args.device)
    main = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        state = PartialState(cpu=device == "cpu")  # one process among several
        device, main = str(state.device), state.is_main_process
    config = VAE_PRESETS[args.vae_arch] if args.vae_arch else None
    vae = load_vae(args.vae_ckpt_path, config=config, step=args.train_steps)
    dataset = open_dataset(args.data_dir, args.resolution)
    data = Path(args.data_dir)
    path = Path(args.output_dir or (data if data.is_dir() else data.parent)) / f"{name}.h5"
    workers = args.num_workers
    if workers is None:
        workers = (
            0
            if device == "cpu"
            else min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        )
    stats = cache_latents(
        vae,
        dataset,
        path,
        batch_size=args.pproc_batch_size,
        workers=workers,
        device=device,
        overwrite=args.overwrite,
        progress=main,
    )
    if not main:
        return
    channels, *sides = CachedLatentsDataset(path).shape
    stds = ", ".join(f"{std:.3f}" for std in stats.std[:4].tolist()) + (" …" if channels > 8 else "")
    print(f"{path}: {len(dataset):,} latents of shape {(channels // 2, *sides)}, std per channel {stds}")


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"there is no device {name!r} ({str(error).splitlines()[0]}): give cpu, cuda or cuda:N"
        ) from None
    return name


# ---------------------------------------------------------------- export-vae


def add_export_vae(commands: argparse._SubParsersAction) -> None:
    """The options of `repae export-vae`."""
    parser = commands.add_parser(
        "export-vae",
        help="take the VAE out of a run: official files, safetensors, diffusers, model card",
        description="Writes SAVE_DIR/NAME/ with NAME.pt, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt in the official layout, "
        "NAME.safetensors, the two files that diffusers' AutoencoderKL.from_pretrained loads, and README.md, "
        "a model card. Latent "
        "statistics are the running ones of the run's SiT.",
    )
    what = parser.add_argument_group("what is exported")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--repae-ckpt",
        metavar="FILE",
        help="a checkpoint of a run, official (0400000.pt) or ours (its folder)",
    )
    source.add_argument("--exp-path", metavar="FOLDER", help="a run folder")
    what.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="with --exp-path: the checkpoint at this step (default: the last)",
    )
    what.add_argument(
        "--raw-stats", action="store_true", help="statistics of the SiT itself and not of its average (EMA)"
    )
    writing = parser.add_argument_group("what is written")
    writing.add_argument(
        "--vae-name",
        default="e2e-vae",
        metavar="NAME",
        help="of the VAE: folder and files are called so (default: e2e-vae)",
    )
    writing.add_argument(
        "--save-dir", default="exps", metavar="FOLDER", help="where its folder goes (default: exps)"
    )
    writing.add_argument("--overwrite", action="store_true", help="replace files of an earlier export")
    sharing = parser.add_argument_group("sharing")
    sharing.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="then upload these files to this repository, made if need be",
    )
    sharing.add_argument("--private", action="store_true", help="make that repository private")
    parser.set_defaults(run=export_vae)


def export_vae(args: argparse.Namespace) -> None:
    """Exports, says what was left out and why, and uploads if asked to."""
    from repae_lite.checkpoints.export import export_vae, push
    from repae_lite.checkpoints.hub import check_repository

    if args.repae_ckpt and args.train_steps is not None:
        raise ValueError(
            "--train-steps chooses in a run folder: give --exp-path FOLDER instead of --repae-ckpt, or leave "
            "it out"
        )
    if args.private and not args.push_to_hub:
        raise ValueError(
            "--private is about a repository: give --push-to-hub OWNER/NAME as well, or leave it out"
        )
    if args.push_to_hub:
        check_repository(args.push_to_hub)
    done = export_vae(
        args.repae_ckpt or args.exp_path, args.vae_name, args.save_dir, step=args.train_steps, ema=not args.raw_stats,
        overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{done['folder']}: {', '.join(done['files'])}")
    for what, why in done["left_out"].items():
        print(f"without {what}: {why}")
    if args.push_to_hub:
        print(f"uploaded to {push(done['folder'], done['files'], args.push_to_hub, private=args.private)}")


# ---------------------------------------------------------------- download


def add_download(commands: argparse._SubParsersAction) -> None:
    """The options of `repae download`."""
    from repae_lite.checkpoints.released import RELEASED
    from repae_lite.commands.presets import RECIPES

    parser = commands.add_parser(
        "download",
        help="fetch released models into pretrained/NAME/",
        description="Fetches released sets of the REPA-E organisation from the Hugging Face Hub. Finished files are kept when the "
        "command is given again; a broken connection is taken up where it broke. Released sets: "
        + ", ".join(RELEASED)
        + ".",
        epilog="HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE of huggingface_hub count. Without --revision the newest commit is "
        "taken and printed; NAME@COMMIT takes that very one.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME[@REVISION]",
        help=f"released sets, or all-for PRESET: what a preset starts from ({', '.join(n for n, r in RECIPES.items() if r.sets)})",
    )
    parser.add_argument(
        "--revision", metavar="COMMIT", help="branch, tag or commit of all names that have none of their own"
    )
    parser.add_argument(
        "--output-dir", default="pretrained", metavar="FOLDER", help="where the sets go (default: pretrained)"
    )
    parser.add_argument(
        "--include",
        metavar="PATTERN",
        help="take files that match, as in '*400k*', where several could be meant",
    )
    parser.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="of a run the checkpoint at this step (default: the last)",
    )
    parser.add_argument("--list", action="store_true", help="only list the remote files and their sizes")
    parser.set_defaults(run=download)


def download(args: argparse.Namespace) -> None:
    """Fetches the sets one after another and says where they are."""
    from repae_lite.checkpoints.download import check_sets, download_set
    from repae_lite.checkpoints.hub import look_up
    from repae_lite.checkpoints.released import ORGANISATION
    from repae_lite.commands.presets import RECIPES

    names = args.names
    if names[0] == "all-for":
        if len(names) != 2 or names[1] not in RECIPES:
            raise ValueError(
                f"{' '.join(names)!r} names no preset: give all-for and one of {', '.join(RECIPES)}"
            )
        if not RECIPES[names[1]].sets:
            raise ValueError(f"{names[1]} starts from nothing released: its networks ship with the project")
        names = RECIPES[names[1]].sets
    check_sets(names, step=args.train_steps)
    for name in names:
        if args.list:
            plain, _, pinned = name.partition("@")
            repository = look_up(f"{ORGANISATION}/{plain}", pinned or args.revision)
            print(f"{repository.name}@{repository.commit}")
            for file, size in sorted(repository.sizes.items()):
                print(f"  {size / 1e6:10.1f} MB  {file}")
            continue
        folder, repository, files = download_set(
            name, args.output_dir, include=args.include, step=args.train_steps, revision=args.revision
        )
        print(f"{folder}: {', '.join(files)} (of {repository.name}@{repository.commit})")
