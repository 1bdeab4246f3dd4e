"""Which patches resemble which? Click one, and see, without a kernel."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repae_lite.checkpoints.models import load_vae
from repae_lite.method.interpolant import Interpolant, interpolate
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Material, Source, ready
from repae_lite.teaching.explorers.noise import SHIPPED, Pair, features, ready_pair, tokens_of
from repae_lite.teaching.explorers.parts import Board, Explorer, enlarged, heat, png_of, sheet

VAES = {"z before tuning": "tiny", "z after 20,000 steps": "tiny-e2e-20k"}
MOST = 8 << 20  # bytes of cosines that a page should hold


@torch.no_grad()
def token_explorer(
    networks: Mapping[str, Pair] = SHIPPED,
    vaes: Mapping[str, Source | AutoencoderKL] = VAES,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    encoder: str | VisionEncoder = "tiny",
    t: float = 0.3,
    path: str | Interpolant = "linear",
    blocks: Sequence[int] | None = None,
    count: int = 12,
    device: str | None = None,
) -> Explorer:
    """A picture whose patches can be clicked: their cosine to all others, in the encoder, SiT and latents.

    All cosines go to the browser once, as float16, so clicks need no kernel and work in the saved notebook.

    Args:
        networks: (SiT, VAE) by name, each shown layer by layer; all are copied, in float32.
        vaes: VAEs by name, of whose latents a patch of the encoder's size is compared.
        images: uint8 (B, 3, H, W); by default those of the embedded evaluation split.
        labels: their classes (B,); the null class where nobody says them.
        encoder: whose tokens are the first map.
        t: the time at which SiT sees the images, with one draw of noise.
        path: from data to noise, on which the SiTs were trained.
        blocks: of SiT, counted from 1; None for all.
        count: how many images, the first ones.
        device: where all is computed; None for the best there is.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_sit`, `load_vae`, `Material` say; the
            patches of an encoder, a SiT and a VAE do not match; there would be too many cosines for a page.
    """
    material = Material.of(images, labels, device, count)
    teacher = ready(encoder, VisionEncoder.from_name, material.device)
    kinds = {"encoder": tokens_of(teacher, material.images)}
    for name, pair in networks.items():
        sit, vae = ready_pair(pair, material.device)
        z = sit.normalize(material.latents(vae))
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
        times = torch.full((len(z),), t).to(z)
        hidden, _ = features(sit, interpolate(z, eps, times, path)[0], times, material.labels_for(sit))
        shown = {k: h for k, h in enumerate(hidden, start=1) if blocks is None or k in blocks}
        kinds |= {f"{name}, block {k}": h for k, h in shown.items()}
    side = round(kinds["encoder"].shape[1] ** 0.5)
    for name, vae in vaes.items():
        z = material.latents(ready(vae, load_vae, material.device))
        z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
        kinds[name] = torch.nn.functional.unfold(z, z.shape[-1] // side, stride=z.shape[-1] // side).mT
    if wrong := [name for name, tokens in kinds.items() if tokens.shape[1] != side**2]:
        raise ValueError(
            f"{wrong[0]} has {kinds[wrong[0]].shape[1]} patches, the encoder {side**2}: choose an encoder, "
            "a SiT and VAEs with one grid"
        )
    size = 2 * len(material.images) * len(kinds) * side**4
    if size > MOST:
        raise ValueError(
            f"{len(kinds)} maps of {len(material.images)} images are {size >> 20} MB of cosines, too many "
            "for a page: choose a smaller count, or fewer blocks"
        )
    similar = torch.stack([_cosines(tokens) for tokens in kinds.values()], 1)  # (images, kinds, cells, cells)
    board = Board(
        pictures=[png_of(enlarged(image, image.shape[-1])) for image in material.images],
        names=[f"image {i}" for i in range(len(material.images))],
        rows=side,
        columns=side,
        cell=(side // 2) * side + side // 2,
        maps=list(kinds),
        similarities=similar.half().cpu().numpy().astype("<f2").tobytes(),
        description="Pick a patch: each map shows its cosine to all patches, from 0 or less (dark) to 1.",
    )

    def still() -> bytes:
        maps = similar[board.shown, :, board.cell].unflatten(1, (side, side))
        rows = {"picture": [material.images[board.shown]]}
        for kind, each in zip(kinds, maps, strict=True):
            rows.setdefault(kind.partition(", block ")[0], []).append(heat(each, 0, 1))
        return sheet(rows)

    return Explorer(lambda progress: None, {}, [board], still=still)


def _cosines(tokens: Tensor) -> Tensor:
    """Cosines (B, N, N) of all pairs of patches (B, N, D), less what all patches of all images share."""
    unit = torch.nn.functional.normalize(tokens - tokens.mean((0, 1)), dim=-1)
    return unit @ unit.mT
