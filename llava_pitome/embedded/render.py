"""Renders a scene with numpy alone, without fonts: the same pixels for the same seed."""

import numpy as np

from llava_pitome.embedded.scenes import PATCH, SIDE, Scene, Thing

RGB = {
    "red": (215, 40, 45), "orange": (245, 135, 25), "yellow": (240, 225, 50), "green": (45, 165, 65),
    "cyan": (60, 205, 220), "blue": (45, 75, 220), "purple": (150, 55, 190), "white": (242, 242, 242),
}  # fmt: skip
GLYPHS = {  # 5 x 7 pixels, one byte per row
    "0": "0e11131519110e", "1": "040c040404040e", "2": "0e11010204081f", "3": "1f02040201110e",
    "4": "02060a121f0202", "5": "1f101e0101110e", "6": "0608101e11110e", "7": "1f010204080808",
    "8": "0e11110e11110e", "9": "0e11110f01020c", "C": "0e11101010110e", "E": "1f10101e10101f",
    "F": "1f10101e101010", "H": "1111111f111111", "K": "11121418141211", "L": "1010101010101f",
    "P": "1e11111e101010", "T": "1f040404040404", "U": "1111111111110e", "Y": "11110a04040404",
}  # fmt: skip


def render(scene: Scene) -> np.ndarray:
    """The image of a scene: (SIDE, SIDE, 3) uint8."""
    rng = np.random.default_rng([scene.seed, 1])
    canvas = BACKDROPS[scene.background](rng)
    for thing in scene.things:
        _draw(canvas, thing, rng)
    canvas += rng.normal(0, 3, canvas.shape)  # noise, as in a photograph
    return np.clip(canvas, 0, 255).astype(np.uint8)


def coverage(thing: Thing) -> np.ndarray:
    """The part of each patch that an object covers: (SIDE / PATCH, SIDE / PATCH) in [0, 1]."""
    full = np.zeros((SIDE, SIDE))
    window, mask, _, _ = _mask(thing.shape, thing.x, thing.y, thing.across)
    full[window] = mask
    grid = SIDE // PATCH
    return full.reshape(grid, PATCH, grid, PATCH).mean((1, 3))


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A greyish colour of medium brightness, unlike the objects' colours."""
    return rng.uniform(60, 140) + rng.uniform(-14, 14, 3)


def _plain(rng: np.random.Generator) -> np.ndarray:
    return np.broadcast_to(_muted(rng), (SIDE, SIDE, 3)).copy()


def _graded(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) - 0.5
    t = (x * np.cos(angle) + y * np.sin(angle)) / 1.42 + 0.5
    return _muted(rng) * (1 - t[..., None]) + _muted(rng) * t[..., None]


def _noisy(rng: np.random.Generator) -> np.ndarray:
    blotches = rng.normal(0, 14, (SIDE // PATCH, SIDE // PATCH)).repeat(PATCH, 0).repeat(PATCH, 1)
    return _plain(rng) + blotches[..., None] + rng.normal(0, 16, (SIDE, SIDE, 1))


def _cluttered(rng: np.random.Generator) -> np.ndarray:
    """Grey distractors in the objects' own shapes and sizes, which no question is about."""
    canvas = _plain(rng)
    shapes = tuple(OUTLINES)
    for _ in range(int(rng.integers(25, 45))):
        x, y = rng.integers(0, SIDE, 2)
        window, mask, _, _ = _mask(
            shapes[rng.integers(len(shapes))], int(x), int(y), int(rng.integers(5, 22))
        )
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
    shape: str, x: int, y: int, across: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """The slices of a shape's bounding box, its mask (h, w) in it, and the offsets from its centre."""
    half = across // 2 + 2
    rows = slice(max(y - half, 0), min(y + half + 1, SIDE))
    cols = slice(max(x - half, 0), min(x + half + 1, SIDE))
    dy, dx = np.mgrid[rows, cols].astype(np.float64)
    dy, dx = dy - y, dx - x
    return (rows, cols), np.clip(0.5 - OUTLINES[shape](dx, dy, across / 2), 0, 1), dx, dy


def _draw(canvas: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    window, mask, dx, dy = _mask(thing.shape, thing.x, thing.y, thing.across)
    color = np.array(RGB[thing.color]) + rng.uniform(-12, 12, 3)
    cell = 2 if thing.size == "small" else 4  # pixels
    shade = np.ones_like(dx)
    if thing.texture == "striped":
        shade = np.where((dy // cell) % 2 == 0, 1.0, 0.4)
    elif thing.texture == "checkered":
        shade = np.where((dx // cell + dy // cell) % 2 == 0, 1.0, 0.4)
    canvas[window] += mask[..., None] * (color * shade[..., None] - canvas[window])
    if thing.mark:
        _write(canvas, thing, ink=0.0 if color @ (0.3, 0.6, 0.1) > 110 else 255.0)


def _write(canvas: np.ndarray, thing: Thing, ink: float) -> None:
    scale = 1 if thing.size == "small" else 2
    rows = np.frombuffer(bytes.fromhex(GLYPHS[thing.mark]), np.uint8)
    glyph = np.unpackbits(rows[:, None], axis=1)[:, 3:].repeat(scale, 0).repeat(scale, 1).astype(bool)
    top, left = thing.y - glyph.shape[0] // 2, thing.x - glyph.shape[1] // 2
    canvas[top : top + glyph.shape[0], left : left + glyph.shape[1]][glyph] = ink
