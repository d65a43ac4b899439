"""Renders a scene with numpy alone, without fonts: the same pixels for the same seed."""

import numpy as np

from llava_pitome.embedded import glyphs
from llava_pitome.embedded.scenes import PATCH, SIDE, Scene, Thing

RGB = {
    "red": (215, 40, 45), "orange": (245, 135, 25), "yellow": (240, 225, 50), "green": (45, 165, 65),
    "cyan": (60, 205, 220), "blue": (45, 75, 220), "purple": (150, 55, 190), "white": (242, 242, 242),
}  # fmt: skip


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (height, width, 3) uint8."""
    rng = np.random.default_rng([scene.seed, 1])
    canvas = BACKDROPS[scene.background](rng, scene.height, scene.width, scene.scale)
    for thing in scene.things:
        _draw(canvas, thing, rng)
    canvas += rng.normal(0, 3, canvas.shape)  # noise, as in a photograph
    return np.clip(canvas, 0, 255).astype(np.uint8)


def coverage(thing: Thing) -> np.ndarray:
    """The part of each patch that an object covers: (SIDE / PATCH, SIDE / PATCH) in [0, 1]."""
    borders = np.arange(0, SIDE + 1, PATCH)
    return coverage_of_cells(thing, SIDE, SIDE, borders, borders)


def coverage_of_cells(
    thing: Thing, height: int, width: int, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """The part of each cell of a grid that an object covers: (R, C) in [0, 1].

    Args:
        thing: the object.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        rows: borders of the grid's rows in pixels of the picture, (R + 1,).
        columns: borders of its columns, (C + 1,).
    """
    (ys, xs), mask, _, _ = _mask(thing, height, width)
    part_y = glyphs.overlap(rows, np.arange(ys.start, ys.stop + 1))
    part_x = glyphs.overlap(columns, np.arange(xs.start, xs.stop + 1))
    return part_y @ mask @ part_x.T


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A greyish colour of medium brightness, unlike the objects' colours."""
    return rng.uniform(60, 140) + rng.uniform(-14, 14, 3)


def _plain(rng: np.random.Generator, height: int, width: int, _scale: float) -> np.ndarray:
    return np.broadcast_to(_muted(rng), (height, width, 3)).copy()


def _graded(rng: np.random.Generator, height: int, width: int, _scale: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / (height - 1) - 0.5, x / (width - 1) - 0.5
    t = (x * np.cos(angle) + y * np.sin(angle)) / 1.42 + 0.5
    return _muted(rng) * (1 - t[..., None]) + _muted(rng) * t[..., None]


def _noisy(rng: np.random.Generator, height: int, width: int, scale: float) -> np.ndarray:
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    blotches = rng.normal(0, 14, (rows, columns)).repeat(PATCH, 0).repeat(PATCH, 1)[:height, :width]
    return _plain(rng, height, width, scale) + blotches[..., None] + rng.normal(0, 16, (height, width, 1))


def _cluttered(rng: np.random.Generator, height: int, width: int, scale: float) -> np.ndarray:
    """Grey distractors in the objects' own shapes and sizes, which no question is about."""
    canvas = _plain(rng, height, width, scale)
    shapes = tuple(OUTLINES)
    density = height * width / (SIDE * scale) ** 2
    for _ in range(int(rng.integers(int(25 * density), int(45 * density)))):
        x, y = (int(rng.integers(0, side)) for side in (width, height))
        shape = shapes[rng.integers(len(shapes))]
        distractor = Thing(shape, "", "plain", int(rng.integers(5, 22) * scale), x, y)
        window, mask, _, _ = _mask(distractor, height, width)
        canvas[window] += mask[..., None] * (_muted(rng) - canvas[window])
    return canvas


BACKDROPS = {"plain": _plain, "graded": _graded, "noisy": _noisy, "cluttered": _cluttered}

# Signed distance to the outline, in pixels: x right, y down, r half the width; negative inside.
OUTLINES = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.9 * r,
    "triangle": lambda x, y, r: np.maximum(abs(x) * 0.87 - (y + r) * 0.5, y - 0.75 * r),
    "cross": lambda x, y, r: np.minimum(
        np.maximum(abs(x) - 0.32 * r, abs(y) - r), np.maximum(abs(y) - 0.32 * r, abs(x) - r)
    ),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.27 * r,
}


def _mask(
    thing: Thing, height: int, width: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """The slices of an object's bounding box, its mask (h, w) in it, and the offsets from its centre."""
    half = thing.across // 2 + 2
    rows = slice(max(thing.y - half, 0), min(thing.y + half + 1, height))
    cols = slice(max(thing.x - half, 0), min(thing.x + half + 1, width))
    dy, dx = np.mgrid[rows, cols].astype(np.float64)
    dy, dx = dy - thing.y, dx - thing.x
    if thing.shape in OUTLINES:
        distance = OUTLINES[thing.shape](dx, dy, thing.across / 2)
    else:  # a sign, as much higher than its word as it is wider
        text_height, text_width = glyphs.extent(thing.mark.upper(), thing.scale)
        tall = text_height + thing.across - text_width
        distance = np.maximum(abs(dx) - thing.across / 2, abs(dy) - tall / 2)
    return (rows, cols), np.clip(0.5 - distance, 0, 1), dx, dy


def _draw(canvas: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    window, mask, dx, dy = _mask(thing, *canvas.shape[:2])
    color = np.array(RGB[thing.color]) + rng.uniform(-12, 12, 3)
    cell = (2 if thing.size == "small" else 4) * thing.scale  # pixels
    shade = np.ones_like(dx)
    if thing.texture == "striped":
        shade = np.where((dy // cell) % 2 == 0, 1.0, 0.4)
    elif thing.texture == "checkered":
        shade = np.where((dx // cell + dy // cell) % 2 == 0, 1.0, 0.4)
    canvas[window] += mask[..., None] * (color * shade[..., None] - canvas[window])
    if thing.mark:
        _write(canvas, thing, ink=0.0 if color @ (0.3, 0.6, 0.1) > 110 else 255.0)


def _write(canvas: np.ndarray, thing: Thing, ink: float) -> None:
    stroke = thing.stroke or (1 if thing.size == "small" else 2)
    ink_share = glyphs.draw(thing.mark.upper(), stroke)[..., None]
    height, width = ink_share.shape[:2]
    top, left = thing.y - height // 2, thing.x - width // 2
    window = canvas[top : top + height, left : left + width]
    window[:] = window * (1 - ink_share) + ink * ink_share
