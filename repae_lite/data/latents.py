"""Cached latents: every image through a frozen VAE once, so that `train-ldm` never runs its encoder.

The command is `repae cache-latents`; taught in `notebooks/06_drop_in_vae.ipynb`. The layout is the official
one: `NAME.h5` holds "00000/img-mean-std-00000000.npy" …, each a float32 .npy of (2C, h, w), the posterior's
mean above its std, and "dataset.json"; `NAME_h5.json` lists the names. Of our own making are "vae.json" in
it, which names the VAE that the latents are of, and `NAME-latents-stats.pt` beside it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Dataset

from repae_lite.data.datasets import CroppedDataset, H5Dataset, ImageH5Dataset, read_batches
from repae_lite.data.hdf5 import open_h5, read_bytes, reading
from repae_lite.data.journal import ResumableH5, check_count, fingerprint, refuse_beside, refuse_existing
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.devices import loading
from repae_lite.utils.files import atomic_path
from repae_lite.utils.locks import check_space, locked
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.processes import from_first_process, process_count, process_rank, together
from repae_lite.utils.progress import progress_bar

STEP = 1000  # images that a killed run has to do again, about
SMALL = 1 << 26  # bytes of latents; if fewer ask for more memory than there is, they are damaged
ABOUT = "vae.json"
STATS = "-latents-stats.pt"  # follows the name of the latents, or of their VAE


def vae_fingerprint(vae: AutoencoderKL) -> str:
    """A name for a VAE's weights: SHA-256 of their names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class CachedLatentsDataset(H5Dataset):
    """Cached latents in the official layout; item i is (float32 (2C, h, w), label): posterior mean, then std.

    The official code's files are read as well as ours. A fresh draw is mean + std * eps. See `H5Dataset`.

    Args:
        path: `NAME.h5`.

    Attributes:
        fingerprint: `vae_fingerprint` of the VAE that the latents are of; None for the official code's files,
            which do not say.
        pixels: `image_marks` of the images that they are of; None where the file does not say.
        shape: (2C, h, w).
    """

    noun, maker = "latent", "repae cache-latents"

    def __init__(self, path: str | Path):
        super().__init__(path)
        with open_h5(self.path) as file:
            with reading(self.path):
                text = ABOUT in file
            text = read_bytes(file, ABOUT) if text else b"{}"
        try:
            about = json.loads(text)
            self.fingerprint: str | None = about.get("fingerprint")
            self.pixels: list | None = about.get("images")
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{ABOUT} in {self.path} is damaged: cache the latents again") from None
        self.shape: tuple[int, ...] = ()
        self.shape = tuple(self[0][0].shape)

    def decode(self, data: bytes, name: str) -> Tensor:
        """The tensor of a .npy.

        Raises:
            ValueError: the bytes are no such latents.
        """
        try:
            moments = np.load(io.BytesIO(data), allow_pickle=False)
        except Exception as error:  # NumPy parses headers as Python: any bytes give any error
            if isinstance(error, MemoryError) and len(data) > SMALL:
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{name} in {self.path} cannot be decoded ({reason}): cache the latents again"
            ) from None
        if (
            not isinstance(moments, np.ndarray)  # an .npz
            or moments.dtype != np.float32
            or moments.ndim != 3
            or moments.shape[0] % 2
            or not moments.size
            or self.shape not in ((), moments.shape)
        ):
            expected = "an even number of channels" if not self.shape else str(self.shape)
            raise ValueError(
                f"{name} in {self.path} is {moments.dtype} of shape {moments.shape} instead of float32 (2C, "
                f"h, w) with {expected}: cache the latents again"
            )
        if not np.isfinite(moments).all():
            raise ValueError(f"{name} in {self.path} has values that are not finite: cache the latents again")
        return torch.from_numpy(moments)

    def check_vae(self, vae: AutoencoderKL) -> None:
        """Refuses a VAE that the latents are not of; of a file that does not say, only channels are checked.

        Raises:
            ValueError: another VAE.
        """
        channels = vae.config.latent_channels
        other = self.fingerprint is not None and self.fingerprint != vae_fingerprint(vae)
        if self.shape[0] != 2 * channels or other:
            what = "other weights" if other else f"{self.shape[0] // 2} latent channels instead of {channels}"
            raise ValueError(
                f"{self.path} was cached by another VAE ({what}): cache the latents again, or give that VAE"
            )


def latent_name(index: int) -> str:
    """The official name of latent number `index`: 1,000 to a folder."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL,
    dataset: ImageH5Dataset | CroppedDataset,
    path: str | Path,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: bool = False,
    step: int = STEP,
) -> LatentStats:
    """Encodes every image in order; writes `NAME.h5`, `NAME_h5.json` and `NAME-latents-stats.pt`.

    Float32, except that PyTorch lets convolutions on a GPU use TF32 unless told otherwise. An unfinished run
    of the same images and VAE is continued; on a CPU the file is then the same to the byte. Where
    torch.distributed is initialised, its processes share the work, and the first one writes.

    Args:
        vae: moved to the device.
        dataset: images, see `repae_lite.open_dataset`.
        path: `NAME.h5`.
        batch_size: images per pass through the encoder, in each process.
        workers: processes that read images.
        device: what the VAE runs on.
        overwrite: replace a finished file, and discard an unfinished one of other images or another VAE.
        progress: show a bar.
        step: about how many images lie between two entries of the journal.

    Returns:
        Statistics of the latents as drawn from their posteriors.

    Raises:
        ValueError: an argument; images that do not fit the VAE; latents that are not finite; a finished or
            different file in the way; another run writes it.
        OSError: it cannot be written, or the disk is too small.
    """
    path = Path(path)
    if path.suffix != ".h5" or batch_size < 1 or workers < 0:
        raise ValueError(
            f"{path}, {batch_size} images a batch, {workers} workers: give NAME.h5, at least 1, and at least "
            "0"
        )
    vae, device = vae.to(device).eval(), torch.device(device)

    def moments(images: Tensor) -> Tensor:
        posterior = vae.encode(to_unit_range(images))
        return torch.cat([posterior.mean, posterior.std], 1).float()

    with ExitStack() as stack:
        file = None
        with together():
            if process_rank() == 0:
                check_output(path, dataset, overwrite)
            # Refuses images that do not fit.
            first = moments(dataset[0][0][None].to(device))[0]
            if process_rank() == 0:
                file, entries, about = _start(stack, vae, dataset, path, first.numel(), overwrite)
        done = torch.tensor([file.state["done"] if file else 0], device=device)
        done = int(from_first_process(done))
        batches = encode_in_order(moments, dataset, first, batch_size, workers, device, done)
        if file is None:  # only the first process knows the file
            for _ in batches:
                pass
            return LatentStats(*from_first_process(torch.zeros(2, len(first) // 2, device=device)).cpu())
        _encode_all(file, batches, len(dataset), max(1, step // batch_size) * batch_size, progress)
        stats = _stats(file.state)
        file.finish_labelled(
            path,
            entries,
            (ABOUT, json.dumps(about).encode()),
            beside=lambda: save_stats(path.with_name(path.stem + STATS), stats),
        )
    from_first_process(torch.stack([stats.mean, stats.std]).to(device))
    return stats


def check_output(path: Path, dataset: Dataset, overwrite: bool) -> None:
    """Refuses to write where the images themselves or finished latents are.

    Raises:
        ValueError: such a file is in the way.
    """
    if path.resolve() == Path(getattr(dataset, "path", "")).resolve():
        raise ValueError(f"{path} holds the images themselves: choose another name for their latents")
    refuse_existing(path, overwrite, "name")
    refuse_beside(path.with_name(path.name + ".partial"), _beside(path), overwrite)


def _beside(path: Path) -> list[Path]:
    return [path.with_name(path.stem + "_h5.json"), path.with_name(path.stem + STATS)]


def _start(
    stack: ExitStack, vae: AutoencoderKL, dataset: Dataset, path: Path, values: int, overwrite: bool
) -> tuple[ResumableH5, list[tuple[str, int | None]], dict]:
    """The file in the making, locked by the stack, its names and labels, and what is told about it."""
    about = {"fingerprint": vae_fingerprint(vae), "downsampling": vae.config.downsampling}
    state = {"done": 0, "labelled": False, "count": 0, "mean": [], "square": []}
    folder = stack.enter_context(locked(path.with_name(path.name + ".partial")))
    file = ResumableH5(folder, _source_print(dataset, about), state, check_count, discard=overwrite)
    file.check_free(*_beside(path), overwrite=overwrite)
    check_space(path.parent, (len(dataset) - file.state["done"]) * (4 * values + 200), "the latents need")
    labels = [None if getattr(dataset, "no_classes", "") else int(label) for label in dataset.labels]
    entries = [(latent_name(i), label) for i, label in enumerate(labels)]
    return file, entries, about | {"images": image_marks(dataset)}


def image_marks(dataset: Dataset) -> list[list[int]]:
    """What tells images from others, whatever they are called: mean colours of the quarters of five."""
    places = sorted({round(i * (len(dataset) - 1) / 4) for i in range(5)})
    return [adaptive_avg_pool2d(dataset[i][0].float(), 2).round().int().flatten().tolist() for i in places]


def same_images(marks: list | None, dataset: Dataset) -> bool:
    """Whether latents with these marks are of these images; None says nothing. Decoders may round."""
    if marks is None:
        return True
    mine = torch.tensor(image_marks(dataset))
    try:
        other = torch.tensor(marks)
    except (ValueError, TypeError, RuntimeError):
        return False
    return mine.shape == other.shape and bool(((mine - other).abs() <= 2).all())


def official_stats(stats: LatentStats) -> dict[str, Tensor]:
    """Latent statistics as official files hold them: scale = 1 / std and bias = mean, each (1, C, 1, 1)."""
    named = {"latents_scale": 1 / stats.std, "latents_bias": stats.mean}
    return {name: values.cpu().view(1, -1, 1, 1) for name, values in named.items()}


def save_stats(path: Path, stats: LatentStats) -> None:
    """Writes the official file of latent statistics."""
    buffer = io.BytesIO()  # into a file PyTorch would write its temporary name
    torch.save(official_stats(stats), buffer)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getbuffer())


def _encode_all(file: ResumableH5, batches: Iterator[Tensor], total: int, step: int, progress: bool) -> None:
    """Brings the file up to all images, in steps of whole batches."""
    with progress_bar(total, file.state["done"], show=progress) as bar:
        while file.state["done"] < total:
            at, end = file.state["done"], min(total, file.state["done"] + step)
            sums = {key: np.array(file.state[key] or 0.0) for key in ("mean", "square")}
            count = file.state["count"]
            with file.step() as added:
                while at < end:
                    moments = next(batches)
                    _check_finite(moments, at)
                    for i, one in enumerate(moments.numpy()):
                        added.add(latent_name(at + i), _npy(one))
                    mean, std = moments.to(torch.float64).chunk(2, dim=1)
                    sums["mean"] = sums["mean"] + mean.sum((0, 2, 3)).numpy()
                    sums["square"] = sums["square"] + (mean.square() + std.square()).sum((0, 2, 3)).numpy()
                    count += mean[:, 0].numel()
                    at += len(moments)
                    bar.update(len(moments))
                file.commit(
                    added, done=at, count=count, **{key: value.tolist() for key, value in sums.items()}
                )
    next(batches, None)  # ends the readers


def encode_in_order(
    encode: Callable[[Tensor], Tensor],
    dataset: Dataset,
    first: Tensor,
    batch: int,
    workers: int,
    device: torch.device,
    done: int,
) -> Iterator[Tensor]:
    """What `encode` makes of all images from number `done` on, a batch at a time, on the CPU.

    Of N processes each encodes every N-th batch; all yield all of them.

    Args:
        encode: gets images (B, 3, H, W) uint8 on the device.
        dataset: items (image, label).
        first: what it makes of one image: shape and dtype of the others.
        batch: images at once, in each process.
        workers: processes that read images.
        device: what it computes on.
        done: images to leave out.
    """
    processes = process_count()
    batches = [range(at, min(at + batch, len(dataset))) for at in range(done, len(dataset), batch)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches[process_rank() :: processes],
        num_workers=workers,
        **loading(device, workers),
    )
    with closing(read_batches(loader)) as mine:
        for start in range(0, len(batches), processes):
            rows = first.new_zeros(batch, *first.shape)
            if start + process_rank() < len(batches):
                encoded = encode(next(mine)[0].to(device, non_blocking=True))
                rows[: len(encoded)] = encoded
            gathered = [rows]
            if processes > 1:
                gathered = [torch.empty_like(rows) for _ in range(processes)]
                dist.all_gather(gathered, rows)
            # The last round may be short.
            for images, found in zip(batches[start : start + processes], gathered, strict=False):
                yield found[: len(images)].cpu()


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _stats(state: dict) -> LatentStats:
    """From the sums over all latents; the variance of a draw is that of the means plus the mean of the
    variances.
    """
    mean, square = torch.tensor([state["mean"], state["square"]], dtype=torch.float64) / state["count"]
    return LatentStats.from_moments(mean, square - mean.square())


# ---------------------------------------------------------------- what is refused


def _source_print(dataset: ImageH5Dataset | CroppedDataset, about: dict) -> str:
    # Not all pixels, but enough to tell two resolutions or data sets apart.
    ends = [dataset[i][0].numpy().tobytes() for i in (0, len(dataset) - 1)]
    head = ["latents 1", about] + ["no classes"] * bool(getattr(dataset, "no_classes", ""))
    return fingerprint(json.dumps(head), dataset.names, dataset.labels, *ends)


def _check_finite(moments: Tensor, at: int) -> None:
    bad = ~torch.isfinite(moments).flatten(1).all(1)
    if bad.any():
        number = at + int(bad.nonzero()[0])
        raise ValueError(
            f"the VAE gives latents that are not finite for image {number}: check its weights, they may be "
            "damaged"
        )
