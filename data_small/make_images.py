"""Draw the embedded dataset: 32x32 icons of ten classes, made from signed-distance parts with numpy alone.

Stands in for ImageNet in the small-scale experiments; taught in notebook 00_map. Every image is a function of
(seed, split, index): its class, its structure (which parts, how many, of what shape), its pose and its
colours all come from one random generator, so any image can be remade alone. Instances of a class differ in
structure as well as in pose: what a patch shows cannot be told from the label.

    python data_small/make_images.py            # write data_small/{train,eval}/images.h5 and CHECKSUMS.sha256
    python data_small/make_images.py --check    # remake and compare with the shipped checksums
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repae_lite.data.hdf5 import write_images_h5
from repae_lite.utils.files import write_text

SIZE = 32  # image side in pixels
SUPERSAMPLE = 2  # drawn at 64x64, averaged down
SPLITS = {"train": 6000, "eval": 2000}
SPLIT_IDS = {"train": 0, "eval": 1}
PART_NAMES = (
    "background", "body", "head", "ear", "eye", "nose", "tail", "fin", "stripe", "wall", "roof", "chimney",
    "door", "window", "stem", "crown", "spot", "cap", "ring", "leaf", "petal", "centre", "hull", "mast",
    "sail", "flag", "wheel", "light", "canopy", "handle", "cone", "flame", "trim", "distractor",
)  # fmt: skip
PART = {name: number for number, name in enumerate(PART_NAMES)}
POSE_NAMES = ("cx", "cy", "log_scale", "log_aspect", "sin_rotation", "cos_rotation", "flip")


@dataclass(frozen=True)
class Look:
    """How hard the images are; the defaults are the *easy* setting, which a small SiT learns in minutes.

    `HARD` is the other one.

    Attributes:
        scale: range of the object's half extent, in half images.
        rotation: largest rotation either way, radians.
        aspect: largest |log| of width over height.
        jitter: largest shift of the centre along each axis, in half images.
        texture: amplitude of the background texture, in units of full brightness.
        distractors: most small shapes scattered behind the object.
        own_hue: share of objects in their class's customary hue; the others take any.
        calm: backgrounds are pale and nearly even instead of strong.
        outline: share of objects with a dark or pale outline.
        levels: brightness levels per channel; 256 keeps full precision, fewer compress better.
    """

    scale: tuple[float, float] = (0.74, 0.90)
    rotation: float = 0.2
    aspect: float = 0.10
    jitter: float = 0.08
    texture: float = 0.01
    distractors: int = 1
    own_hue: float = 0.8
    calm: bool = True
    outline: float = 0.0
    levels: int = 64


HARD = Look(
    scale=(0.56, 0.82),
    rotation=0.45,
    jitter=0.2,
    texture=0.10,
    distractors=5,
    own_hue=0.4,
    calm=False,
    outline=0.75,
)


class Drawing(NamedTuple):
    """One icon: `image` (32, 32, 3) and `parts` (32, 32), indices into `PART_NAMES`; `pose` (7,) float32."""

    image: np.ndarray
    parts: np.ndarray
    pose: np.ndarray


# ---- signed distances: negative inside; coordinates x right, y up, the object within [-1, 1]^2 -------------


def ellipse(x, y, cx, cy, rx, ry=None):
    ry = rx if ry is None else ry
    if ry == rx:
        return np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - rx
    a, b = (x - cx) / rx, (y - cy) / ry
    k = np.sqrt(a * a + b * b)
    return k * (k - 1.0) / np.maximum(np.sqrt((a / rx) ** 2 + (b / ry) ** 2), 1e-9)  # exact to first order


def box(x, y, cx, cy, hx, hy, r=0.0):
    qx, qy = np.abs(x - cx) - (hx - r), np.abs(y - cy) - (hy - r)
    if r == 0.0:
        return np.maximum(qx, qy)
    return np.sqrt(np.maximum(qx, 0) ** 2 + np.maximum(qy, 0) ** 2) + np.minimum(np.maximum(qx, qy), 0) - r


def polygon(x, y, *points):
    """A convex polygon, corners in either order."""
    area = sum(ax * by - bx * ay for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True))
    sign = 1.0 if area > 0 else -1.0
    distance = None
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        side = ((x - ax) * ey - (y - ay) * ex) * (sign / np.hypot(ex, ey))
        distance = side if distance is None else np.maximum(distance, side)
    return distance


def segment(x, y, ax, ay, bx, by, r):
    ex, ey = bx - ax, by - ay
    s = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
    return np.sqrt((x - ax - s * ex) ** 2 + (y - ay - s * ey) ** 2) - r


def union(*distances):
    return np.minimum.reduce(distances)


def both(*distances):
    return np.maximum.reduce(distances)


# ---- the canvas --------------------------------------------------------------------------------------------


class Canvas:
    """Collects the parts of one object, bottom to top, in the object's own coordinates."""

    def __init__(self, x: np.ndarray, y: np.ndarray, rng: np.random.Generator):
        self.x, self.y, self.rng = x, y, rng
        self.layers: list[tuple[int, np.ndarray, np.ndarray, bool]] = []

    def add(self, part: str, distance: np.ndarray, colour: np.ndarray, solid: bool = True) -> np.ndarray:
        """Adds a part; `solid` parts make the silhouette, which gets the outline."""
        self.layers.append((PART[part], distance, colour, solid))
        return distance

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def count(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(self.rng.integers(low, high + 1))


@dataclass(frozen=True)
class Palette:
    """The colours of one image, each (3,) in [0, 1]."""

    main: np.ndarray
    second: np.ndarray
    accent: np.ndarray
    dark: np.ndarray
    pale: np.ndarray
    back: tuple[np.ndarray, np.ndarray]  # the two ends of the background's gradient


def hsv(h: float, s: float, v: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(h % 1.0, s, v))


def pick_palette(c: Canvas, hue: float, look: Look) -> Palette:
    """Colours of one image; the background always differs from the object."""
    h = hue + c.between(-0.05, 0.05) if c.chance(look.own_hue) else c.between(0, 1)
    main = hsv(h, c.between(0.6, 0.95), c.between(0.65, 0.95))
    second = hsv(h + (0.1, 0.33, 0.5, 0.62)[c.count(0, 3)], c.between(0.5, 0.9), c.between(0.55, 0.95))
    accent = hsv(c.between(0, 1), c.between(0.6, 1.0), c.between(0.8, 1.0))
    saturation, brightness, slope = (
        ((0.05, 0.3), (0.70, 0.95), 0.1) if look.calm else ((0.08, 0.5), (0.45, 0.98), 0.16)
    )
    back = main
    for _ in range(12):
        back = hsv(c.between(0, 1), c.between(*saturation), c.between(*brightness))
        if np.abs(back - main).sum() > 0.75 and np.abs(back - second).sum() > 0.5:
            break
    end = np.clip(back + c.between(-slope, slope) + 0.05 * (c.rng.random(3) - 0.5), 0, 1)
    return Palette(main, second, accent, hsv(h, 0.5, c.between(0.1, 0.22)), hsv(h, 0.08, 0.97), (back, end))


# ---- the ten classes ---------------------------------------------------------------------------------------


def fish(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    rx, ry = c.between(0.54, 0.68), c.between(0.32, 0.5)
    kind, spread = c.count(0, 2), c.between(0.36, 0.58)
    fins = p.second if c.chance(0.7) else p.main * 0.75
    if kind == 0:
        tail = polygon(x, y, (-0.28, 0), (-0.97, spread), (-0.97, -spread))
    elif kind == 1:
        tail = union(
            polygon(x, y, (-0.28, 0.06), (-1.0, spread + 0.1), (-0.72, -0.04)),
            polygon(x, y, (-0.28, -0.06), (-1.0, -spread - 0.1), (-0.72, 0.04)),
        )
    else:
        tail = union(ellipse(x, y, -0.7, 0.22, 0.3, 0.21), ellipse(x, y, -0.7, -0.22, 0.3, 0.21))
    c.add("tail", tail, fins)
    top = c.count(0, 3)  # none, triangle, long sail, two spikes
    if top == 1:
        c.add("fin", polygon(x, y, (0.4, ry * 0.7), (-0.15, ry * 0.7), (-0.2, ry + 0.34)), fins)
    elif top == 2:
        c.add("fin", both(ellipse(x, y, 0.08, ry * 0.75, 0.45, 0.4), 0.1 - y), fins)
    elif top == 3:
        for left in (-0.25, 0.12):
            c.add(
                "fin",
                polygon(x, y, (left, ry * 0.6), (left + 0.34, ry * 0.6), (left - 0.02, ry + 0.28)),
                fins,
            )
    if c.chance(0.55):
        c.add("fin", polygon(x, y, (0.25, -ry * 0.7), (-0.12, -ry * 0.7), (-0.2, -ry - 0.28)), fins)
    body = c.add("body", ellipse(x, y, 0.2, 0, rx, ry), p.main)
    if c.chance(0.4):
        c.add("stripe", both(body + 0.03, y + ry * 0.25), p.pale * 0.6 + p.main * 0.4, False)
    marks = c.count(0, 4)  # none, one to three bars, spots
    if marks <= 3:
        for i in range(marks):
            c.add("stripe", both(body, np.abs(x - 0.22 + 0.24 * i) - 0.065), p.second, False)
    else:
        for i in range(c.count(2, 4)):
            c.add("spot", ellipse(x, y, 0.2 - 0.2 * i, c.between(-0.18, 0.18), 0.085), p.accent, False)
    if c.chance(0.5):
        c.add("fin", polygon(x, y, (0.3, -0.04), (-0.06, 0.08), (-0.06, -0.24)), fins * 0.85, False)
    c.add("eye", ellipse(x, y, 0.56, 0.11, 0.13), p.pale, False)
    c.add("eye", ellipse(x, y, 0.59, 0.11, 0.07), p.dark, False)
    if c.chance(0.3):
        for i in range(c.count(1, 3)):
            c.add("trim", ellipse(x, y, 0.84 + 0.05 * (i % 2), 0.42 + 0.22 * i, 0.085), p.pale, False)


def house(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    half, eaves = c.between(0.58, 0.78), c.between(-0.05, 0.22)
    ridge = c.between(0.72, 0.95)
    wall = p.second if c.chance(0.5) else p.pale * 0.9
    if c.chance(0.55):
        side = -1 if c.chance(0.5) else 1
        chimney, top = side * c.between(0.28, 0.46), c.between(0.72, 0.95)
        c.add("chimney", box(x, y, chimney, (eaves + top) / 2, 0.11, (top - eaves) / 2), p.dark * 1.6)
        if c.chance(0.5):
            c.add("trim", ellipse(x, y, chimney + 0.12, top + 0.12, 0.13, 0.1), p.pale * 0.95, False)
    c.add("wall", box(x, y, 0, (eaves - 0.92) / 2, half, (eaves + 0.92) / 2), wall)
    kind, over = c.count(0, 3), half + c.between(0.08, 0.2)  # gable, hip, half-round, lean-to
    if kind == 0:
        roof = polygon(x, y, (-over, eaves), (over, eaves), (0, ridge))
    elif kind == 1:
        flat = over * c.between(0.35, 0.65)
        roof = polygon(x, y, (-over, eaves), (over, eaves), (flat, ridge - 0.15), (-flat, ridge - 0.15))
    elif kind == 2:
        roof = both(ellipse(x, y, 0, eaves, over, ridge - eaves), eaves - y)
    else:
        roof = polygon(x, y, (-over, eaves), (over, eaves), (over * 0.8, ridge), (-over, eaves + 0.22))
    c.add("roof", roof, p.main)
    if kind in (0, 2) and c.chance(0.35):
        c.add("window", ellipse(x, y, 0, eaves + (ridge - eaves) * 0.36, 0.13), p.pale, False)
    door = (-0.55, 0.0, 0.55)[c.count(0, 2)] * half if c.chance(0.85) else None
    if door is not None:
        tall = c.between(0.3, 0.42)
        shape = box(x, y, door, -0.92 + tall, 0.15, tall, 0.0)
        if c.chance(0.4):
            shape = union(shape, ellipse(x, y, door, -0.92 + 2 * tall - 0.02, 0.15))
        c.add("door", shape, p.accent * 0.8 if c.chance(0.6) else p.dark, False)
    glass = (hsv(0.14, 0.5, 1.0), hsv(0.55, 0.45, 0.95), p.dark)[c.count(0, 2)]
    size, high, bars, round_ = (
        c.between(0.12, 0.17),
        c.between(-0.3, -0.2) + eaves * 0.5,
        c.chance(0.4),
        c.chance(0.2),
    )
    for at in (-0.55, 0.0, 0.55):
        cx = at * half
        if (door is not None and abs(cx - door) < 0.05) or c.chance(0.25):
            continue
        pane = ellipse(x, y, cx, high, size) if round_ else box(x, y, cx, high, size, size)
        c.add("window", pane, glass, False)
        if bars:
            c.add("window", both(pane, np.abs(x - cx) - 0.035), wall * 0.7, False)


def tree(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    bark = hsv(c.between(0.04, 0.1), c.between(0.45, 0.7), c.between(0.3, 0.55))
    wide, lean = c.between(0.09, 0.16), c.between(-0.08, 0.08)
    c.add(
        "stem",
        polygon(x, y, (-wide * 1.4, -0.97), (wide * 1.4, -0.97), (lean + wide, 0.1), (lean - wide, 0.1)),
        bark,
    )
    kind = c.count(0, 3)  # round, cloud, fir, poplar
    if kind == 0:
        c.add(
            "crown", crown := ellipse(x, y, lean, 0.3, c.between(0.56, 0.68), c.between(0.55, 0.66)), p.main
        )
    elif kind == 1:
        puffs = [ellipse(x, y, lean, 0.45, c.between(0.4, 0.5))]
        for side in (-1, 1):
            puffs.append(
                ellipse(x, y, lean + side * c.between(0.32, 0.48), c.between(0.02, 0.3), c.between(0.28, 0.4))
            )
        if c.chance(0.5):
            puffs.append(ellipse(x, y, c.between(-0.4, 0.4), 0.62, 0.28))
        c.add("crown", crown := union(*puffs), p.main)
    elif kind == 2:
        tiers, low, high = c.count(2, 4), -0.5, 0.98
        step, crowns = (high - low) / (tiers + 0.7), []
        for i in range(tiers):
            width = 0.74 * (1 - 0.62 * i / tiers)
            base = low + i * step
            crowns.append(polygon(x, y, (-width, base), (width, base), (0, base + 1.7 * step)))
            shade = p.main * (0.8 + 0.2 * i / max(tiers - 1, 1))
            c.add("crown", crowns[-1], shade)
        crown = union(*crowns)
    else:
        c.add("crown", crown := ellipse(x, y, 0, 0.22, c.between(0.34, 0.45), 0.76), p.main)
    if kind != 2 and c.chance(0.35):
        for side in (-1, 1)[: c.count(1, 2)]:
            c.add("stem", segment(x, y, lean, -0.2, lean + side * 0.26, 0.18, 0.05), bark, False)
    if c.chance(0.45):
        for _ in range(c.count(2, 6)):
            spot = ellipse(x, y, c.between(-0.42, 0.42), c.between(-0.1, 0.65), c.between(0.075, 0.11))
            c.add("spot", both(spot, crown + 0.02), p.accent, False)
    if c.chance(0.25):
        c.add("trim", ellipse(x, y, 0, -1.0, c.between(0.45, 0.8), 0.14), p.main * 0.7, False)


def mushroom(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    flesh = p.pale * c.between(0.85, 1.0)
    rx, ry, brim = c.between(0.72, 0.95), c.between(0.62, 0.98), c.between(-0.12, 0.08)
    thin, thick = c.between(0.15, 0.24), c.between(0.24, 0.38)
    if c.chance(0.3):  # a small one beside it
        side = -1 if c.chance(0.5) else 1
        c.add("stem", box(x, y, side * 0.62, -0.75, 0.09, 0.25), flesh)
        c.add("cap", both(ellipse(x, y, side * 0.62, -0.55, 0.28, 0.3), -0.55 - y), p.main * 0.85)
    stem = polygon(x, y, (-thick, -0.93), (thick, -0.93), (thin, brim + 0.1), (-thin, brim + 0.1))
    if c.chance(0.5):
        stem = union(stem, ellipse(x, y, 0, -0.8, thick + 0.06, 0.17))
    c.add("stem", stem, flesh)
    if c.chance(0.4):
        c.add("ring", box(x, y, 0, c.between(-0.42, -0.25), thin + 0.13, 0.06, 0.05), flesh * 0.75)
    kind = c.count(0, 2)  # dome, cone, flat with drooping brim
    if kind == 0:
        cap = both(ellipse(x, y, 0, brim, rx, ry), brim - y)
    elif kind == 1:
        cap = polygon(x, y, (-rx, brim), (rx, brim), (rx * 0.62, brim + ry * 0.6), (0.12, brim + ry),
                      (-0.12, brim + ry), (-rx * 0.62, brim + ry * 0.6))  # fmt: skip
    else:
        cap = both(ellipse(x, y, 0, brim + 0.02, rx, ry * 0.8), brim - 0.06 - y)
        cap = union(
            cap, ellipse(x, y, -rx + 0.16, brim, 0.18, 0.15), ellipse(x, y, rx - 0.16, brim, 0.18, 0.15)
        )
    if c.chance(0.5):
        c.add("ring", ellipse(x, y, 0, brim, rx * 0.88, 0.14), flesh * 0.7)
    c.add("cap", cap, p.main)
    dots = p.pale if c.chance(0.6) else p.accent
    pattern = c.count(0, 5)
    if pattern >= 2:
        shift, size = c.between(-0.15, 0.15), c.between(0.09, 0.16)
        places = ((0.0, 0.55), (-0.48, 0.28), (0.45, 0.3), (0.18, 0.16), (-0.22, 0.75))
        for dx, dy in places[: pattern + c.count(-1, 0)]:
            spot = ellipse(x, y, dx * rx + shift, brim + dy * ry, size * c.between(0.75, 1.2))
            c.add("spot", both(spot, cap + 0.03), dots, False)
    elif pattern == 1:
        c.add("stripe", both(cap, np.abs(y - brim - 0.14) - 0.06), dots, False)
    if c.chance(0.3):
        for at in (-0.6, -0.45, 0.45, 0.6):
            c.add(
                "leaf",
                segment(x, y, at, -0.95, at * 1.15, c.between(-0.7, -0.5), 0.05),
                hsv(0.3, 0.7, 0.6),
                False,
            )


def sailboat(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    deck, keel, bow = c.between(-0.48, -0.36), c.between(-0.9, -0.8), c.between(0.86, 1.0)
    at, top = c.between(-0.12, 0.12), c.between(0.86, 0.98)
    cloth = p.pale if c.chance(0.5) else p.second
    timber = hsv(0.08, 0.5, c.between(0.25, 0.5))
    foot = deck + c.between(0.08, 0.16)
    masts = 2 if c.chance(0.25) else 1
    if masts == 2:
        at = -0.3
        c.add("mast", box(x, y, 0.38, (deck + 0.62) / 2, 0.045, (0.62 - deck) / 2), timber)
        c.add("sail", polygon(x, y, (0.46, foot), (0.9, foot), (0.46, 0.6)), cloth * 0.92)
    c.add("mast", box(x, y, at, (deck + top) / 2, 0.05, (top - deck) / 2), timber)
    kind, width = c.count(0, 2), c.between(0.5, 0.78)  # triangle, gaff, square
    back = max(at - width, -0.92)
    if kind == 0:
        sail = polygon(x, y, (at - 0.06, foot), (back, foot), (at - 0.06, top - 0.06))
    elif kind == 1:
        sail = polygon(
            x, y, (at - 0.06, foot), (back, foot), (back * 0.75 + at * 0.25, 0.55), (at - 0.06, top - 0.12)
        )
    else:
        wide = 0.34 if masts == 2 else width * 0.85
        sail = polygon(
            x, y, (at - wide, foot), (at + wide, foot), (at + wide * 0.8, 0.62), (at - wide * 0.8, 0.62)
        )
    c.add("sail", sail, cloth)
    if c.chance(0.35):
        high = c.between(0.0, 0.2)
        c.add("stripe", both(sail, np.abs(y - high) - 0.09), p.accent, False)
    if masts == 1 and kind != 2 and c.chance(0.7):
        reach = c.between(0.45, 0.75)
        c.add(
            "sail",
            polygon(x, y, (at + 0.08, foot), (at + reach, foot), (at + 0.08, c.between(0.45, 0.8))),
            p.accent,
        )
    if c.chance(0.4):
        c.add("flag", polygon(x, y, (at, top), (at, top - 0.2), (at + 0.3, top - 0.1)), p.accent)
    hull = polygon(x, y, (-bow, deck), (bow, deck), (bow * 0.62, keel), (-bow * 0.7, keel))
    c.add("hull", hull, p.main)
    trim = c.count(0, 3)  # plain, stripe, portholes, both
    if trim in (1, 3):
        c.add(
            "stripe", both(hull, np.abs(y - deck + 0.1) - 0.05), p.accent if c.chance(0.5) else p.pale, False
        )
    if trim in (2, 3):
        for i in range(c.count(2, 4)):
            c.add("window", ellipse(x, y, -0.45 + 0.28 * i, (deck + keel) / 2 - 0.05, 0.085), p.pale, False)
    if c.chance(0.5):
        sea = y + 0.84 + 0.05 * np.sin(9 * x + c.between(0, 6))
        c.add(
            "trim", both(sea, np.abs(x) - 1.3), hsv(c.between(0.52, 0.62), 0.6, c.between(0.55, 0.85)), False
        )


def flower(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    green = hsv(c.between(0.24, 0.42), c.between(0.5, 0.8), c.between(0.4, 0.7))
    cx, cy, bend = c.between(-0.1, 0.1), c.between(0.28, 0.36), c.between(-0.14, 0.14)
    middle = np.clip((y + 1.0) / 1.3, 0, 1)
    c.add(
        "stem",
        both(np.abs(x - cx * middle - bend * 4 * middle * (1 - middle)) - 0.06, y - cy, -0.98 - y),
        green,
    )
    for side in (-1, 1):
        if c.chance(0.65):
            low, long = c.between(-0.8, -0.5), c.between(0.32, 0.48)
            a, b = x - bend * 0.8 - side * long * 0.75, y - low - 0.08
            tilt = side * c.between(0.3, 0.7)
            leaf = ellipse(
                a * np.cos(tilt) + b * np.sin(tilt),
                b * np.cos(tilt) - a * np.sin(tilt),
                0,
                0,
                long * 0.75,
                0.13,
            )
            c.add("leaf", leaf, green * 0.9)
    petals, kind = c.count(5, 8), c.count(0, 2)  # round, long, pointed
    phase, reach = c.between(0, 2 * np.pi), c.between(0.36, 0.42)
    two_tone = c.chance(0.3) and petals % 2 == 0
    inner = c.chance(0.3)
    for i in range(petals):
        angle = phase + 2 * np.pi * i / petals
        co, si = np.cos(angle), np.sin(angle)
        a, b = (x - cx) * co + (y - cy) * si, (y - cy) * co - (x - cx) * si
        width = min(0.26, 1.2 / petals)
        if kind == 0:
            petal = ellipse(a, b, reach, 0, width, width)
        elif kind == 1:
            petal = ellipse(a, b, reach - 0.05, 0, 0.33, width * 0.85)
        else:
            petal = polygon(a, b, (0, 0), (0.38, width), (0.72, 0), (0.38, -width))
        c.add("petal", petal, p.second if two_tone and i % 2 else p.main * (1.0 if i % 2 else 0.88))
    if inner:
        c.add("ring", ellipse(x, y, cx, cy, 0.31), p.second, False)
    radius = c.between(0.16, 0.25)
    c.add("centre", ellipse(x, y, cx, cy, radius), hsv(0.14, 0.8, 1.0) if c.chance(0.5) else p.accent, False)
    if c.chance(0.35):
        c.add("spot", ellipse(x, y, cx, cy, radius * 0.5), p.dark * 1.5, False)


def cat(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    sits = c.chance(0.6)  # with a body, or the face alone
    rx, ry = (
        (c.between(0.5, 0.6), c.between(0.4, 0.48)) if sits else (c.between(0.72, 0.85), c.between(0.58, 0.7))
    )
    cy, k = (0.2, 0.68) if sits else (-0.15, 1.0)  # height of the face, its scale
    other = p.pale if c.chance(0.5) else p.second
    if sits:
        if c.chance(0.75):
            up = c.between(-0.45, 0.1)
            bend = union(
                segment(x, y, 0.3, -0.84, 0.78, -0.76, 0.1), segment(x, y, 0.78, -0.76, 0.86, up, 0.1)
            )
            c.add("tail", bend, p.main * 0.85)
            if c.chance(0.5):
                c.add("tail", both(bend, up - 0.2 + 0.12 - y), other, False)
        body = c.add("body", ellipse(x, y, 0, -0.58, c.between(0.42, 0.52), 0.44), p.main)
        if c.chance(0.5):
            c.add("body", both(ellipse(x, y, 0, -0.6, 0.24, 0.32), body), other, False)
        if c.chance(0.6):
            for side in (-1, 1):
                c.add("body", ellipse(x, y, side * 0.2, -0.92, 0.17, 0.1), other)
    tall, apart, fold = c.between(0.42, 0.56) * k, c.between(0.66, 0.8), c.chance(0.2)
    for side in (-1, 1):
        out, base = side * rx * (apart + 0.22), cy + ry * 0.25
        tip = (side * rx * apart, cy + ry * 0.75 + tall * (0.55 if fold and side > 0 else 1))
        c.add("ear", polygon(x, y, (out, base), (side * rx * 0.1, cy + ry * 0.7), tip), p.main * 0.9)
        if not sits or c.chance(0.5):
            c.add("ear", polygon(x, y, (out * 0.88, base + 0.12), (side * rx * 0.32, cy + ry * 0.75),
                                 (tip[0] * 0.97, tip[1] - 0.16 * k)), hsv(0.97, 0.4, 0.9), False)  # fmt: skip
    head = c.add("head", ellipse(x, y, 0, cy, rx, ry), p.main)
    marks = c.count(0, 3)  # none, forehead stripes, eye patch, pale muzzle
    if marks == 1:
        for dx in (-0.18, 0, 0.18):
            c.add("stripe", both(head, np.abs(x - dx * k) - 0.055, cy + ry * 0.45 - y), p.dark, False)
    elif marks == 2:
        c.add("spot", both(head, ellipse(x, y, rx * 0.5, cy + ry * 0.3, rx * 0.5, ry * 0.6)), other, False)
    elif marks == 3:
        c.add("head", both(head, ellipse(x, y, 0, cy - ry * 0.55, rx * 0.5, ry * 0.45)), other, False)
    iris = (p.pale, hsv(0.3, 0.6, 0.95), hsv(0.14, 0.7, 1.0))[c.count(0, 2)]
    shut = c.chance(0.15)
    for side in (-1, 1):
        ex, ey = side * rx * 0.46, cy + ry * 0.12
        if shut:
            c.add("eye", box(x, y, ex, ey, 0.17 * k, 0.055), p.dark, False)
        else:
            c.add("eye", ellipse(x, y, ex, ey, 0.17 * k, 0.19 * k), iris, False)
            c.add("eye", ellipse(x, y, ex, ey, 0.08 * k, 0.17 * k), p.dark, False)
    low = cy - ry * 0.28
    c.add(
        "nose",
        polygon(x, y, (-0.13 * k, low), (0.13 * k, low), (0, low - 0.16 * k)),
        hsv(0.97, 0.5, 0.85),
        False,
    )
    if c.chance(0.6):
        for side in (-1, 1):
            for rise in (0.08, -0.14)[: c.count(1, 2)]:
                whisker = segment(
                    x, y, side * rx * 0.45, low - 0.1 * k, side * (rx + 0.2 * k), low + rise * k, 0.022
                )
                c.add("trim", whisker, p.dark if marks == 3 else p.pale * 0.9, False)


def car(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    sill, belt = -0.38, c.between(0.02, 0.14)
    kind = c.count(0, 4)  # saloon, hatchback, van, pickup, beetle
    top = c.between(0.44, 0.58) + (0.12 if kind == 2 else 0.0)
    left, right, front, rear = (
        (-0.62, 0.5, 0.22, -0.36), (-0.9, 0.46, 0.2, -0.72), (-0.92, 0.74, 0.6, -0.9),
        (-0.1, 0.6, 0.4, -0.02), (-0.74, 0.62, 0.26, -0.34),
    )[kind]  # fmt: skip
    cabin = polygon(x, y, (left, belt - 0.05), (right, belt - 0.05), (front, top), (rear, top))
    if kind == 4:
        cabin = both(ellipse(x, y, -0.06, belt - 0.06, 0.72, top - belt + 0.08), belt - 0.06 - y)
    extra = c.count(0, 5)  # roof rack, roof light, spoiler, or nothing
    if extra == 0 and kind != 4:
        c.add("trim", box(x, y, (front + rear) / 2, top + 0.14, abs(front - rear) / 2 * 0.9, 0.085), p.second)
    elif extra == 1:
        c.add("light", box(x, y, (front + rear) / 2, top + 0.06, 0.11, 0.09, 0.05), p.accent)
    elif extra == 2 and kind != 3:
        c.add(
            "trim",
            polygon(x, y, (-0.98, belt + 0.25), (-0.98, belt + 0.13), (-0.6, belt - 0.1)),
            p.dark * 1.5,
        )
    c.add("roof", cabin, p.second if c.chance(0.3) else p.main)
    glass = hsv(0.55, c.between(0.15, 0.4), c.between(0.75, 1.0)) if c.chance(0.75) else p.dark * 1.4
    panes = both(cabin + 0.085, belt + 0.02 - y)
    posts = {0: (-0.08,), 1: (-0.18,), 2: (-0.42, 0.14), 3: (), 4: (-0.06,)}[kind]
    if c.chance(0.25):
        posts = posts[:-1]
    for post in posts:
        panes = both(panes, 0.055 - np.abs(x - post))
    if kind == 2 and c.chance(0.4):
        panes = both(panes, 0.2 - x)  # a delivery van: no side windows
    body = box(x, y, 0, (sill + belt) / 2, 0.97, (belt - sill) / 2, 0.13)
    c.add("body", body, p.main)
    c.add("window", panes, glass, False)
    if c.chance(0.35):
        c.add("stripe", both(body, np.abs(y + 0.1) - 0.055), p.pale if c.chance(0.5) else p.accent, False)
    if c.chance(0.5):
        c.add("door", box(x, y, c.between(-0.02, 0.1), -0.02, 0.07, 0.03), p.dark, False)
    c.add("light", ellipse(x, y, 0.9, -0.04, 0.08, 0.1), hsv(0.14, 0.5, 1.0), False)
    if c.chance(0.6):
        c.add("light", ellipse(x, y, -0.92, -0.04, 0.06, 0.1), hsv(0.0, 0.8, 0.9), False)
    radius, hub = c.between(0.21, 0.27), c.count(0, 2)
    places = (-0.56, 0.56) if kind not in (2, 3) or c.chance(0.7) else (-0.68, -0.16, 0.6)
    for cx in places:
        c.add("wheel", ellipse(x, y, cx, sill - 0.03, radius), np.full(3, 0.12))
        if hub:
            c.add(
                "wheel",
                ellipse(x, y, cx, sill - 0.03, radius * (0.35, 0.58)[hub - 1]),
                np.full(3, 0.8),
                False,
            )


def umbrella(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    rim, rx, ry = c.between(-0.02, 0.12), c.between(0.86, 0.98), c.between(0.66, 0.84)
    shaft = hsv(0.08, 0.5, c.between(0.2, 0.5)) if c.chance(0.6) else np.full(3, c.between(0.15, 0.35))
    grip = p.accent * 0.85 if c.chance(0.5) else shaft
    if c.chance(0.7):
        c.add(
            "cone", polygon(x, y, (-0.06, rim + ry - 0.1), (0.06, rim + ry - 0.1), (0, rim + ry + 0.2)), shaft
        )
    c.add("stem", box(x, y, 0, (rim - 0.7) / 2, 0.05, (rim + 0.75) / 2), shaft)
    kind, r = c.count(0, 3), c.between(0.15, 0.2)  # hook, hook, straight grip, knob
    if kind <= 1:
        hook = both(np.abs(np.sqrt((x - r) ** 2 + (y + 0.74) ** 2) - r) - 0.06, y + 0.74)
        c.add("handle", union(hook, box(x, y, 0, -0.66, 0.06, 0.09)), grip)
        c.add("handle", box(x, y, 2 * r, -0.7, 0.06, 0.05), grip)
    elif kind == 2:
        c.add("handle", box(x, y, 0, -0.78, 0.1, 0.18, 0.06), grip)
    else:
        c.add("handle", ellipse(x, y, 0, -0.84, 0.13), grip)
    scallops = c.count(3, 6)
    half = rx / scallops
    dent = np.minimum.reduce(
        [ellipse(x, y, -rx + half * (2 * i + 1), rim, half * 1.02, 0.19) for i in range(scallops)]
    )
    dome = ellipse(x, y, 0, rim, rx, ry)
    canopy = both(dome, rim - y, -dent) if c.chance(0.75) else both(dome, rim - y)
    c.add("canopy", canopy, p.main)
    pattern = c.count(0, 3)  # plain, panels, band, dots
    if pattern == 1:
        height = np.sqrt(np.clip(1 - ((y - rim) / ry) ** 2, 1e-3, 1))
        across = np.clip(x / (rx * height), -1, 1)  # which rib-to-rib panel, -1 to 1
        odd = np.floor((across + 1) / 2 * scallops - 1e-9).astype(int) % 2 == 1
        c.add("stripe", np.where(odd, canopy, 1.0), p.second if c.chance(0.6) else p.pale, False)
    elif pattern == 2:
        c.add("stripe", both(canopy, np.abs(ellipse(x, y, 0, rim, rx, ry) + 0.24) - 0.075), p.second, False)
    elif pattern == 3:
        for dx, dy in ((-0.5, 0.35), (-0.05, 0.6), (0.1, 0.3), (0.55, 0.35))[: c.count(2, 4)]:
            c.add("spot", both(canopy, ellipse(x, y, dx * rx, rim + dy * ry, 0.115)), p.second, False)
    if c.chance(0.3):
        for _ in range(c.count(2, 4)):
            dx = c.between(0.3, 0.9) * (1 if c.chance(0.5) else -1)
            dy = c.between(-0.8, -0.25)
            c.add("trim", segment(x, y, dx, dy, dx - 0.05, dy - 0.16, 0.045), hsv(0.56, 0.55, 0.95), False)


def rocket(c: Canvas, p: Palette) -> None:
    x, y = c.x, c.y
    half, tail = c.between(0.26, 0.36), c.between(-0.6, -0.48)
    hull = p.pale if c.chance(0.55) else p.second
    if c.chance(0.7):
        long, width = c.between(0.25, 0.4), half * c.between(0.6, 0.85)
        c.add(
            "flame",
            polygon(x, y, (-width, tail + 0.04), (width, tail + 0.04), (0, tail - long - 0.08)),
            hsv(0.06, 0.9, 1),
        )
        if c.chance(0.7):
            inner = polygon(x, y, (-width / 2, tail + 0.04), (width / 2, tail + 0.04), (0, tail - long * 0.6))
            c.add("flame", inner, hsv(0.15, 0.7, 1), False)
    kind, out, high = c.count(0, 2), c.between(0.66, 0.84), c.between(-0.2, 0.1)
    for side in (-1, 1):
        if kind == 0:  # swept fins
            fin = polygon(
                x, y, (side * half * 0.6, high), (side * half * 0.6, tail), (side * out, tail - 0.22)
            )
        elif kind == 1:  # square fins
            fin = polygon(x, y, (side * half * 0.6, high), (side * half * 0.6, tail),
                          (side * out, tail - 0.08), (side * out, tail + 0.24))  # fmt: skip
        else:  # boosters
            fin = union(box(x, y, side * (half + 0.13), tail + 0.22, 0.13, 0.3),
                        polygon(x, y, (side * half, tail + 0.5), (side * (half + 0.26), tail + 0.5),
                                (side * (half + 0.13), tail + 0.78)))  # fmt: skip
        c.add("fin", fin, p.main if kind < 2 else p.main * 0.85)
    centre, length = 0.15, c.between(0.78, 0.84)
    round_ = c.chance(0.5)
    if round_:  # a bulging hull
        body = both(ellipse(x, y, 0, centre - 0.1, half * 1.25, length + 0.1), tail - y)
    else:  # straight sides under a pointed nose
        shoulder = centre + length * 0.35
        body = polygon(x, y, (-half, tail), (half, tail), (half, shoulder), (half * 0.55, shoulder + 0.3),
                       (0, 0.97), (-half * 0.55, shoulder + 0.3), (-half, shoulder))  # fmt: skip
    c.add("body", body, hull)
    if c.chance(0.8):
        c.add("cone", both(body, c.between(0.42, 0.58) - y), p.main, False)
    bands = c.count(0, 2)
    for i in range(bands):
        c.add(
            "stripe", both(body, np.abs(y - tail - 0.12 - 0.2 * i) - 0.055), p.accent if i else p.main, False
        )
    if c.chance(0.4):
        c.add(
            "fin",
            polygon(x, y, (-0.06, -0.2), (0.06, -0.2), (0.06, tail - 0.12), (-0.06, tail - 0.12)),
            p.main * 0.8,
        )
    glass = hsv(c.between(0.5, 0.6), c.between(0.3, 0.7), c.between(0.6, 1.0))
    for i in range(c.count(0, 2) if c.chance(0.5) else 1):
        c.add("window", ellipse(x, y, 0, 0.24 - 0.34 * i, 0.17 if i == 0 else 0.12), p.dark, False)
        c.add("window", ellipse(x, y, 0, 0.24 - 0.34 * i, 0.11 if i == 0 else 0.07), glass, False)


CLASSES = {  # name: (drawing function, customary hue); the order is the label
    "fish": (fish, 0.06), "house": (house, 0.0), "tree": (tree, 0.32), "mushroom": (mushroom, 0.0),
    "sailboat": (sailboat, 0.6), "flower": (flower, 0.9), "cat": (cat, 0.08), "car": (car, 0.98),
    "umbrella": (umbrella, 0.75), "rocket": (rocket, 0.0),
}  # fmt: skip


# ---- one image ---------------------------------------------------------------------------------------------

_AXIS = (np.arange(SIZE * SUPERSAMPLE) + 0.5) / (SIZE * SUPERSAMPLE) * 2 - 1
_X, _Y = np.meshgrid(_AXIS, -_AXIS)  # (64, 64): x right, y up, the image within [-1, 1]^2
_PIXEL = 2.0 / (SIZE * SUPERSAMPLE)


def _background(c: Canvas, look: Look, ends: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Gradient plus a weak texture: stripes, a checkerboard or soft blotches; (64, 64, 3)."""
    angle = c.between(0, 2 * np.pi)
    ramp = np.clip(0.5 + 0.4 * (_X * np.cos(angle) + _Y * np.sin(angle)), 0, 1)[..., None]
    rgb = ends[0] * (1 - ramp) + ends[1] * ramp
    turn, period, phase = c.between(0, np.pi), c.between(5, 13), c.between(0, 2 * np.pi)
    a, b = _X * np.cos(turn) + _Y * np.sin(turn), _Y * np.cos(turn) - _X * np.sin(turn)
    kind = c.count(0, 3)
    if kind == 0:
        wave = np.sign(np.sin(period * a + phase))
    elif kind == 1:
        wave = np.sign(np.sin(period * a + phase) * np.sin(period * b))
    elif kind == 2:
        wave = np.sin(0.6 * period * a + phase) + np.sin(0.45 * period * b + 2 * phase)
    else:
        wave = np.zeros_like(a)
    return rgb + look.texture * c.between(0.3, 1.0) * wave[..., None]


def _scatter(c: Canvas, look: Look, palette: Palette) -> list[tuple[np.ndarray, np.ndarray]]:
    """Small discs, squares, triangles and rings towards the border, a little off the background's colour."""
    shapes = []
    for _ in range(c.count(0, look.distractors)):
        angle, radius, size = c.between(0, 2 * np.pi), c.between(0.8, 1.15), c.between(0.08, 0.17)
        cx, cy = np.clip((radius * np.cos(angle), radius * np.sin(angle)), -0.92, 0.92)
        kind = c.count(0, 3)
        if kind == 0:
            shape = ellipse(_X, _Y, cx, cy, size)
        elif kind == 1:
            shape = box(_X, _Y, cx, cy, size, size)
        elif kind == 2:
            shape = polygon(_X, _Y, (cx - size, cy - size), (cx + size, cy - size), (cx, cy + size))
        else:
            shape = np.abs(ellipse(_X, _Y, cx, cy, size)) - 0.045
        tint = hsv(c.between(0, 1), 0.6, 0.85)
        shapes.append((shape, 0.6 * palette.back[0] + 0.4 * tint))
    return shapes


def _reduce_parts(parts: np.ndarray) -> np.ndarray:
    """The commonest part of each 2x2 block (ties: the later name); (64, 64) -> (32, 32)."""
    s = np.sort(parts.reshape(SIZE, 2, SIZE, 2).transpose(0, 2, 1, 3).reshape(SIZE, SIZE, 4), axis=-1)
    s0, s1, s2, s3 = np.moveaxis(s, -1, 0)
    return np.select([s1 == s2, s2 == s3, s0 == s1], [s1, s2, s1], s3).astype(np.uint8)


def draw(label: int, rng: np.random.Generator, look: Look = Look()) -> Drawing:
    """Draws one icon of class `label`; every choice comes from `rng`.

    Raises:
        ValueError: the label is not one of the ten classes.
    """
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"Label {label} is not a class; use 0 to {len(CLASSES) - 1}.")
    sketch, hue = list(CLASSES.values())[label]
    c = Canvas(_X, _Y, rng)
    # Pose: image coordinates -> the object's own.
    scale, aspect = c.between(*look.scale), c.between(-look.aspect, look.aspect)
    turn, flip = c.between(-look.rotation, look.rotation), c.chance(0.5)
    cx, cy = c.between(-look.jitter, look.jitter), c.between(-look.jitter, look.jitter)
    co, si = np.cos(turn), np.sin(turn)
    dx, dy = _X - cx, _Y - cy
    stretch = np.exp(aspect / 2)
    c.x = (co * dx + si * dy) / (scale * stretch) * (-1.0 if flip else 1.0)
    c.y = (co * dy - si * dx) / (scale / stretch)
    palette = pick_palette(c, hue, look)
    rgb = _background(c, look, palette.back)
    parts = np.zeros(_X.shape, np.uint8)
    for distance, colour in _scatter(c, look, palette):
        rgb += np.clip(0.5 - distance / _PIXEL, 0, 1)[..., None] * (colour - rgb)
        parts[distance < 0] = PART["distractor"]
    # The object: outline first, then its parts from back to front, lit from one side, with darker edges.
    light_angle, strength, rounding = c.between(0.2, np.pi - 0.2), c.between(0.0, 0.2), c.between(0.0, 0.3)
    light = 1.0 + strength * (_X * np.cos(light_angle) + _Y * np.sin(light_angle))
    outline = c.rng.random()
    thick = c.between(0.07, 0.12)
    sketch(c, palette)
    pixel = _PIXEL / scale
    silhouette = union(*[distance for _, distance, _, solid in c.layers if solid])
    if outline < look.outline:
        ink = palette.dark if outline < 0.8 * look.outline else palette.pale
        rgb += np.clip(0.5 - (silhouette - thick) / pixel, 0, 1)[..., None] * (ink - rgb)
    for part, distance, colour, solid in c.layers:
        shade = light * (1 - rounding * np.clip(1 + distance / 0.16, 0, 1)) if solid else light
        alpha = np.clip(0.5 - distance / pixel, 0, 1)
        rgb += alpha[..., None] * (np.minimum(colour * shade[..., None], 1.0) - rgb)
        parts[distance < 0] = part
    small = np.clip(rgb, 0, 1).reshape(SIZE, SUPERSAMPLE, SIZE, SUPERSAMPLE, 3).mean((1, 3))  # (32, 32, 3)
    steps = look.levels - 1
    image = np.rint(np.rint(small * steps) * (255 / steps)).astype(np.uint8)
    pose = np.array([cx, cy, np.log(scale), aspect, np.sin(turn), np.cos(turn), float(flip)], np.float32)
    return Drawing(image, _reduce_parts(parts), pose)


def object_mask(parts: np.ndarray) -> np.ndarray:
    """True where the class's object is: neither background nor distractor."""
    return (parts != PART["background"]) & (parts != PART["distractor"])


def make_one(split: str, index: int, seed: int = 0, look: Look = Look()) -> tuple[Drawing, int]:
    """Remakes image `index` of a split, and its label (index modulo 10: balanced).

    Raises:
        ValueError: the split is unknown.
    """
    if split not in SPLIT_IDS:
        raise ValueError(f"Split {split!r} is unknown; use one of {', '.join(SPLIT_IDS)}.")
    label = index % len(CLASSES)
    return draw(label, np.random.default_rng([seed, SPLIT_IDS[split], index]), look), label


def make_split(
    split: str, count: int, seed: int = 0, *, look: Look = Look(), progress: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws the first `count` images of a split.

    Returns:
        images (N, 3, 32, 32) uint8, labels (N,) int64, parts (N, 32, 32) uint8, poses (N, 7) float32 as
        `POSE_NAMES`.

    Raises:
        ValueError: the split is unknown, or the count is not positive.
    """
    if count < 1:
        raise ValueError(f"count {count} makes no images; use a positive number.")
    indices = range(count)
    if progress:
        from tqdm import tqdm

        indices = tqdm(indices, desc=split, unit="img")
    made = [make_one(split, index, seed, look) for index in indices]
    images = np.ascontiguousarray(np.stack([drawing.image for drawing, _ in made]).transpose(0, 3, 1, 2))
    labels = np.array([label for _, label in made], np.int64)
    return images, labels, np.stack([d.parts for d, _ in made]), np.stack([d.pose for d, _ in made])


# ---- files -------------------------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def record_checksums(folder: Path, digests: dict[str, str]) -> None:
    """Writes CHECKSUMS.sha256 with these digests by name; those of other files stay."""
    path = folder / "CHECKSUMS.sha256"
    lines = path.read_text().splitlines() if path.is_file() else []
    known = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    write_text(path, "".join(f"{digest}  {name}\n" for name, digest in (known | digests).items()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent, help="folder to write to, or to check"
    )
    parser.add_argument("--check", action="store_true", help="remake all pixels and compare; write nothing")
    args = parser.parse_args()

    digests = {}
    for split, count in SPLITS.items():
        images, labels, _, _ = make_split(split, count, progress=True)
        digests[f"pixels of {split}"] = sha256(images.tobytes())
        if not args.check:
            path = args.out / split / "images.h5"
            write_images_h5(path, images, labels)
            for file in (path, path.with_name("images_h5.json")):
                digests[f"{split}/{file.name}"] = sha256(file.read_bytes())
    if args.check:
        checksums = args.out / "CHECKSUMS.sha256"
        known = checksums.read_text().splitlines() if checksums.is_file() else []
        for name, digest in digests.items():
            if f"{digest}  {name}" not in known:
                print(
                    f"{name} differ from {checksums}: another numpy, or a changed maker",
                    file=sys.stderr,
                )
                return 1
        print("all pixels are as shipped")
        return 0
    record_checksums(args.out, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
