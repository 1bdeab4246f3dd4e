"""Cached targets: the vision encoders' tokens of every image, computed once instead of in every epoch.

That is possible because no data here are flipped or cropped at random. One safetensors file holds a float16
tensor (images, N, D) for each encoder, and in its metadata what they are of; loader processes read it through
a memory map.
"""

import json
import math
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from repae_lite.data.datasets import CroppedDataset, ImageH5Dataset
from repae_lite.data.journal import fingerprint
from repae_lite.data.latents import STEP, encode_in_order, vae_fingerprint
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.utils.errors import first_line
from repae_lite.utils.files import sync, write_text
from repae_lite.utils.locks import check_space, locked, writing
from repae_lite.utils.processes import from_first_process, process_rank, together
from repae_lite.utils.progress import progress_bar


class CachedTargets(Dataset):
    """Cached tokens; item i is a list of those of image i, float16 (N, D), of each encoder.

    Safe to fork, spawn and pickle: each process maps the file at its first read.

    Args:
        path: the file.
        about: what its tokens must be of, as `cache_targets` tells it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or of something else.
    """

    def __init__(self, path: Path, about: dict[str, str]):
        self.path, self._tokens, self._process = path, [], None
        try:
            held = safe_open(path, "pt").metadata() or {}
        except SafetensorError as error:
            reason = first_line(error)
            raise ValueError(
                f"{path} is no whole file of cached targets ({reason}): give --cache-targets another file, "
                "or remove this one, and it is written again"
            ) from None
        except OSError as error:
            raise OSError(
                f"the cached targets {path} cannot be read ({first_line(error)}): give --cache-targets a "
                "file on a disk that all processes see"
            ) from None
        for key, value in about.items():
            if held.get(key) != value:
                raise ValueError(
                    f"{path} holds the tokens of other {key} ({held.get(key, 'it does not say')}) than this "
                    f"run has ({value}): give --cache-targets another file"
                )

    def __getitem__(self, index: int) -> list[Tensor]:
        if self._process != os.getpid():
            file = safe_open(self.path, "pt")
            self._tokens = [file.get_slice(name) for name in sorted(file.keys())]
            self._process = os.getpid()
        return [tokens[index] for tokens in self._tokens]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tokens": [], "_process": None}


@torch.no_grad()
def cache_targets(
    encoders: Sequence[VisionEncoder],
    dataset: ImageH5Dataset | CroppedDataset,
    path: str | Path,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    step: int = STEP,
) -> CachedTargets:
    """The encoders' tokens of all images, from a file that is written first if it is not there.

    Encoded without mixed precision, then rounded to float16. An unfinished file of the same encoders and
    images is continued. Where torch.distributed is initialised, its processes share the work, and the first
    one writes.

    Args:
        encoders: on the device.
        dataset: images, the same at every reading.
        path: the file.
        batch_size: images per pass through the encoders, in each process.
        workers: processes that read images.
        device: what the encoders run on.
        progress: show a bar.
        step: about how many images a killed run has to do again.

    Raises:
        ValueError: the file is of something else, or damaged; tokens beyond float16; another run writes it.
        OSError: it cannot be written, or the disk is too small.
    """
    path, device, count, file = Path(path), torch.device(device), len(dataset), None

    def tokens(images: Tensor) -> Tensor:
        return torch.cat([encoder(images).flatten(1) for encoder in encoders], 1).half()

    with ExitStack() as stack:
        with together():
            about = _about(encoders, dataset)
            first = tokens(dataset[0][0][None].to(device))[0]
            if process_rank() == 0 and not os.path.lexists(path):
                folder = stack.enter_context(locked(path.with_name(path.name + ".partial")))
                file = _Unfinished(folder, encoders, count, about)
        done = int(from_first_process(torch.tensor([file.done if file else count], device=device)))
        batches = encode_in_order(tokens, dataset, first, batch_size, workers, device, done)
        with progress_bar(count, done, show=progress and done < count) as bar:
            for rows in batches:
                if file:
                    file.add(rows, step)
                    bar.update(len(rows))
        with together():  # nobody opens it before it is there
            if file:
                file.finish(path)
    with together():
        return CachedTargets(path, about)


def _about(encoders: Sequence[VisionEncoder], dataset: Dataset) -> dict[str, str]:
    """What tokens depend on. Not all pixels, but enough to tell two resolutions or data sets apart."""
    pixels = [dataset[i][0].numpy().tobytes() for i in (0, len(dataset) // 2, len(dataset) - 1)]
    images = fingerprint("targets 1", dataset.names, dataset.labels, *pixels)[:16]
    each = (f"{one.name}, {one.resolution} pixels, weights {vae_fingerprint(one)[:16]}" for one in encoders)
    return {"encoders": "; ".join(each), "images": f"{len(dataset)}, {images}"}


class _Unfinished:
    """The file in the making, beside a journal of how many images are on the disk for certain.

    Its header says what the tokens are of: an unfinished file with the same header is continued.
    """

    def __init__(self, folder: Path, encoders: Sequence[VisionEncoder], count: int, about: dict[str, str]):
        self.folder, self.path, self.journal = folder, folder / folder.stem, folder / "journal.json"
        shapes = [(count, one.grid_size**2, one.embed_dim) for one in encoders]
        ends = [0, *accumulate(2 * math.prod(shape) for shape in shapes)]
        tensors = {
            f"{i:02} {one.name}": {"dtype": "F16", "shape": shapes[i], "data_offsets": ends[i : i + 2]}
            for i, one in enumerate(encoders)
        }
        text = json.dumps({"__metadata__": about} | tensors).encode()
        text += b" " * (-len(text) % 8)  # numbers lie at multiples of their size
        head = struct.pack("<Q", len(text)) + text  # as https://huggingface.co/docs/safetensors describes it
        self.starts, self.values = [len(head) + at for at in ends[:-1]], [n * d for _, n, d in shapes]
        with writing(folder.parent):
            known = self.path.exists() and self.journal.exists()  # the file may have been finished and moved
            self.done = self.saved = int(self.journal.read_text()) if known else 0
            if not self.done:
                self.path.write_bytes(head)
            with open(self.path, "rb") as file:
                if file.read(len(head)) != head:
                    raise ValueError(
                        f"{folder} holds unfinished tokens of other encoders or images: remove it, or give "
                        "--cache-targets another file"
                    )
            each = 2 * sum(self.values)
            told = f"the encoders' tokens, {each / 1000:,.0f} kB an image, need"
            check_space(folder.parent, (count - self.done) * each, told)

    def add(self, rows: Tensor, step: int) -> None:
        """Writes the next images' tokens, float16 (B, values of all encoders)."""
        if bad := (~rows.isfinite().all(1)).nonzero().tolist():
            raise ValueError(
                f"the tokens of image {self.done + bad[0][0]} do not fit float16: leave --cache-targets out"
            )
        with writing(self.folder.parent):
            with open(self.path, "rb+") as file:
                for start, part in zip(self.starts, rows.split(self.values, 1), strict=True):
                    file.seek(start + 2 * part.shape[1] * self.done)
                    file.write(part.numpy().tobytes())
            self.done += len(rows)
            if self.done >= self.saved + step:
                sync(self.path)
                write_text(self.journal, str(self.done))
                self.saved = self.done

    def finish(self, path: Path) -> None:
        """Puts the file in its place and removes the rest."""
        with writing(path.parent):
            sync(self.path)
            os.replace(self.path, path)
        with suppress(OSError):
            self.journal.unlink(missing_ok=True)
            (self.folder / "lock").unlink()
            self.folder.rmdir()
