"""Scenes of `embedded-next`: pictures of many sizes, whose words and digits are legible in the tiles alone.

Objects have the same sizes as in `scenes`, counted in pixels of the tiles. Strokes are one pixel of the tiles
wide, or slightly wider: half a pixel or less in the thumbnail along at least one axis.
"""

import math

import numpy as np

from llava_pitome.embedded import glyphs
from llava_pitome.embedded.anyres import Tiling, tiling
from llava_pitome.embedded.scenes import (
    BACKGROUNDS,
    COLORS,
    DIGITS,
    GAP,
    LARGE,
    LETTERS,
    MARK_ROOM,
    MARKABLE,
    SHAPES,
    SMALL,
    TEXTURES,
    TRIES,
    Scene,
    Thing,
)

SHORTEST, LONGEST = 112, 336  # sides in pixels
LONG_SIDES = (200, 337)  # of a picture's longer side, a half-open interval
ASPECT = 3.0  # the most
COUNTS = (3, 13)  # of objects, a half-open interval
SIGN = "sign"  # the shape of an object with a word
FRAME = 3  # pixels between a word and the edge of its sign
REDUCED_STROKE = 1.2  # pixels of a tile, where the picture has more pixels than its tiles
WORDS = (
    "box", "cat", "dog", "fox", "hat", "jam", "key", "map", "net", "owl", "pie", "sun", "van", "web", "zip",
    "bird", "cake", "desk", "fish", "gold", "hand", "jump", "king", "lamp", "moon", "park", "rain", "ship",
    "tree", "wolf",
    "bread", "chair", "dance", "field", "grape", "horse", "juice", "knife", "lemon", "music", "night",
    "ocean", "piano", "river", "storm", "tiger", "voice", "world",
)  # fmt: skip


def scene(seed: int, size: tuple[int, int] | None = None, crowd: int = 1) -> Scene:
    """The scene of a seed: 3 to 12 objects that do not touch, among them signs with words.

    Args:
        seed: of everything.
        size: height and width of the picture; by default they follow from the seed.
        crowd: multiplies the number of objects, as far as they fit.
    """
    rng = np.random.default_rng([seed, 3])
    height, width = size or sample_size(rng)
    tiles = tiling(height, width)
    scale = 1.0 if tiles.scale >= 1 else REDUCED_STROKE / tiles.scale
    count = int(rng.integers(*COUNTS))
    signs = crowd * int(rng.integers(1, 3 if count < 6 else 5))
    large = int(rng.integers(0, 4))
    count *= crowd
    kinds = ["sign"] * signs + ["large"] * large + ["small"] * max(count - signs - large, 1)
    words = iter(rng.choice(WORDS, signs, replace=False))
    things: list[Thing] = []
    for kind in kinds[:count]:  # those that need most room first
        thing = _thing(rng, kind, str(next(words)) if kind == "sign" else "", scale)
        placed = _place(rng, thing, things, tiles)
        things += [placed] if placed else []
    order = rng.permutation(len(things))
    background = str(rng.choice(BACKGROUNDS))
    return Scene(seed, background, tuple(things[i] for i in order), height, width, scale)


def sample_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of a picture: any aspect up to 3, upright or not."""
    longer = int(rng.integers(*LONG_SIDES))
    aspect = math.exp(rng.uniform(0, math.log(ASPECT)))
    shorter = max(round(longer / aspect), SHORTEST)
    return (shorter, longer) if rng.random() < 0.6 else (longer, shorter)


def half_extent(thing: Thing) -> tuple[int, int]:
    """Half the height and width of an object's box in pixels."""
    if thing.shape != SIGN:
        return thing.across // 2 + 1, thing.across // 2 + 1
    height, width = glyphs.extent(thing.mark.upper(), thing.scale)
    frame = round(FRAME * thing.scale)
    return height // 2 + frame + 1, width // 2 + frame + 1


def _thing(rng: np.random.Generator, kind: str, word: str, scale: float) -> Thing:
    """An object at no position yet."""
    color = str(rng.choice(COLORS))
    if kind == "sign":
        _, width = glyphs.extent(word.upper(), scale)
        return Thing(SIGN, color, "plain", width + 2 * round(FRAME * scale), 0, 0, word, scale, scale)
    across = int(rng.integers(*(LARGE if kind == "large" else SMALL)))
    shape = str(rng.choice(SHAPES))
    marked = shape in MARKABLE and rng.random() < 0.7
    across = max(across, MARK_ROOM) if marked else across
    mark = str(rng.choice(list(DIGITS if rng.random() < 0.7 else LETTERS))) if marked else ""
    texture = "plain" if mark else str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
    return Thing(shape, color, texture, int(across * scale), 0, 0, mark, scale, scale)


def _place(rng: np.random.Generator, thing: Thing, things: list[Thing], tiles: Tiling) -> Thing | None:
    """The object at a position inside the picture where it touches no other; None where there is none.

    No border between two tiles cuts an object with a word or character.
    """
    (height, width), (half_y, half_x) = tiles.size, half_extent(thing)
    gap = max(GAP, round(GAP * thing.scale))
    if 2 * half_x >= width or 2 * half_y >= height:
        return None
    for _ in range(TRIES):
        y, x = int(rng.integers(half_y, height - half_y)), int(rng.integers(half_x, width - half_x))
        if thing.mark and any(
            (abs(tiles.tile_borders(axis) - at) <= half).any()
            for axis, (at, half) in enumerate(((y, half_y), (x, half_x)))
        ):
            continue
        others = ((t, *half_extent(t)) for t in things)
        if all(
            abs(x - t.x) >= half_x + ox + gap or abs(y - t.y) >= half_y + oy + gap for t, oy, ox in others
        ):
            return Thing(**{**vars(thing), "x": x, "y": y})
    return None
