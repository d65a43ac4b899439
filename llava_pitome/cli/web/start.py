"""How the page's choices merge, and which of them it starts with."""

import json
from typing import NamedTuple

from llava_pitome.cli.draw.configs import amount_in_own_place
from llava_pitome.config import MergeConfig

RATIO = 0.9  # where nothing says how far to merge
STEP = 0.005  # of the slider
LEAST = 0.7  # where the slider begins, unless it starts below


class Start(NamedTuple):
    """What the page is opened with.

    Attributes:
        method: a name in METHODS.
        ratio: where the slider stands.
        note: for people, where that is not how the model was saved to merge; else empty.
    """

    method: str = MergeConfig.method
    ratio: float = RATIO
    note: str = ""


def merging(method: str, ratio: float, patches: int, count: int) -> MergeConfig:
    """How a method merges in the place its authors have it, down to the tokens that a tower's ratio leaves.

    Args:
        method: a name in METHODS.
        ratio: share that each tower layer keeps.
        patches: of an image.
        count: tower layers up to the feature layer.
    """
    return MergeConfig(method=method, **amount_in_own_place(method, {"ratio": ratio}, patches, count))


def start(ratio: float | None, saved: MergeConfig | None, patches: int, count: int) -> Start:
    """What is asked for, or else how the model was saved to merge, as far as a method and a ratio can say it.

    Args:
        ratio: that was asked for, if any.
        saved: with the model, if anything.
        patches: of an image.
        count: tower layers up to the feature layer.
    """
    if ratio is not None:
        return Start(ratio=ratio)
    if saved is None:
        return Start()
    steps = [round(1 - STEP * i, 3) for i in range(round(1 / STEP))]
    for keep in [saved.ratio] if isinstance(saved.ratio, int | float) else steps:
        if merging(saved.method, keep, patches, count) == saved:
            return Start(saved.method, keep)
    return Start(
        note=f"This model was saved to merge with `{json.dumps(saved.changes())}`, which a method and a "
        f"ratio cannot say. It is not used here: the page starts with {Start().method} at a ratio of {RATIO}."
    )
