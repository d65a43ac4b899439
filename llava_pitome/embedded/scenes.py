"""A scene as data: a few objects on a background, sampled from a seed.

Merging too many tokens costs accuracy on such scenes: most of an image is background or the inside of a large
object, while the object of a question can be one to three patches wide.
"""

from dataclasses import dataclass

import numpy as np

SIDE = 112  # pixels; 14 x 14 patches of 8 pixels
PATCH = 8
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
TEXTURES = ("plain", "striped", "checkered")
BACKGROUNDS = ("plain", "graded", "noisy", "cluttered")
DIGITS = "0123456789"
LETTERS = "CEFHKLPTUY"  # no A: VQA's answer cleaning drops articles
SMALL, LARGE = (10, 16), (24, 37)  # widths in pixels, half-open intervals: 1-3 and 3-5 patches
MARKABLE = ("circle", "square")  # a 5 x 7 character fits inside
MARK_ROOM = 12  # least width in pixels for a character
GAP = 2  # least pixels between two objects
TRIES = 200  # positions sampled for an object before it is left out


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` its centre and `across` its width, in pixels; `mark` a character, a word or ''.

    `scale` is the number of pixels that the widths SMALL and LARGE and stripes count as one, `stroke` the
    width of a character's strokes in pixels; 0 is one in a small object, two in a large one.
    """

    shape: str
    color: str
    texture: str
    across: int
    x: int
    y: int
    mark: str = ""
    scale: float = 1.0
    stroke: float = 0.0

    @property
    def size(self) -> str:
        """'small' or 'large'; no width is in between."""
        return "small" if self.across < SMALL[1] * self.scale else "large"


@dataclass(frozen=True)
class Scene:
    """Objects, background, the seed of the rendering, and the image's sides in pixels."""

    seed: int
    background: str
    things: tuple[Thing, ...]
    height: int = SIDE
    width: int = SIDE
    scale: float = 1.0  # of its objects


def scene(seed: int) -> Scene:
    """The scene of a seed: three to seven objects that do not touch, at least one of them small."""
    rng = np.random.default_rng([seed, 0])
    count = int(rng.integers(3, 8))
    large = int(rng.integers(0, 3))
    widths = [int(rng.integers(*(LARGE if i < large else SMALL))) for i in range(count)]
    things: list[Thing] = []
    for across in widths:  # large ones first, while they fit
        place = _place(rng, across, things)
        if place is not None:
            things.append(_thing(rng, across, *place))
    order = rng.permutation(len(things))
    return Scene(seed, str(rng.choice(BACKGROUNDS)), tuple(things[i] for i in order))


def _place(rng: np.random.Generator, across: int, things: list[Thing]) -> tuple[int, int] | None:
    """A centre at which an object of this width is inside the image and touches no other."""
    half = across // 2 + 1
    for _ in range(TRIES):
        x, y = (int(v) for v in rng.integers(half, SIDE - half, 2))
        if all(max(abs(x - t.x), abs(y - t.y)) >= half + t.across // 2 + 1 + GAP for t in things):
            return x, y
    return None


def _thing(rng: np.random.Generator, across: int, x: int, y: int) -> Thing:
    shape, color = str(rng.choice(SHAPES)), str(rng.choice(COLORS))
    marked = shape in MARKABLE and across >= MARK_ROOM and rng.random() < 0.6
    mark = str(rng.choice(list(DIGITS + LETTERS))) if marked else ""
    texture = "plain" if mark else str(rng.choice(TEXTURES, p=(0.5, 0.25, 0.25)))
    return Thing(shape, color, texture, across, x, y, mark)
