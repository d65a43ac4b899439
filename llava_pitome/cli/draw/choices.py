"""What `draw` is asked for: how each method merges, and behind which layers to look.

Numbers and names alone, so that what does not fit is refused before a model is loaded.
"""

import argparse
from typing import Any

from llava_pitome.config import MergeConfig, requested
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.methods import METHODS, PLACES
from llava_pitome.models import checkpoints

RATIO = 0.9  # where nothing says how far to merge
LAYER = 1  # of the language model, for methods that merge there: behind the second, as FastV's paper has it


def configs(options: argparse.Namespace, patches: int, count: int) -> dict[str, MergeConfig]:
    """How each method merges, by the name of its row; as the checkpoint was saved where nothing is asked for.

    A method whose authors merge behind the tower does so, down to the tokens that the tower's ratio leaves.

    Args:
        options: of the command.
        patches: of an image.
        count: tower layers up to the feature layer.

    Raises:
        ValueError: they do not go together, or do not fit the model.
    """
    amount = {"ratio": options.ratio, "tokens": options.tokens}
    placed = (options.merging or {}).keys() & set(AMOUNTS)  # says where, and how far
    if not placed and options.ratio is None and options.tokens is None:
        asks = options.method or options.merging or options.recipe != "paper"
        saved = None if asks else checkpoints.saved_merge_config(options.model)
        if saved is not None:
            return _named([MergeConfig.from_dict(saved)], "as saved", patches, count)
        amount["ratio"] = RATIO
    found = []
    for method in options.method or [None]:
        name = method or (options.merging or {}).get("method", MergeConfig.method)
        named = amount if placed or name not in METHODS else at_home(name, amount, patches, count)
        found.append(requested(options.recipe, named | {"method": method}, options.merging))
    return _named(found, "" if options.recipe == "paper" else options.recipe, patches, count)


def at_home(method: str, amount: dict[str, Any], patches: int, count: int) -> dict[str, Any]:
    """How far a method merges in the place its authors have it, as fields of MergeConfig.

    Args:
        method: a name in METHODS.
        amount: ratio or tokens of the tower, whose number of tokens another place leaves, too.
        patches: of an image.
        count: tower layers up to the feature layer.
    """
    place = METHODS[method].places[0]
    if place == PLACES[0]:
        return amount
    left = MergeConfig(**amount).tokens_at(patches, count)
    return {place: {LAYER: left} if place == "decoder" else left}


def _named(found: list[MergeConfig], how: str, patches: int, count: int) -> dict[str, MergeConfig]:
    """Configs by the names of their rows.

    Raises:
        ValueError: one of them does not fit the model.
    """
    for config in found:
        config.tokens_at(patches, count)
    return {f"{c.method} ({how})" if how else c.method: c for c in found}


def layers(
    wanted: tuple[int, ...] | None, found: dict[str, MergeConfig], patches: int, count: int
) -> list[int]:
    """The tower layers to look behind, from 1, ascending.

    Where none are wanted: a quarter, half and three quarters of the way to the last layer in which any method
    merges, and that.

    Args:
        wanted: as they were asked for.
        found: how methods merge.
        patches: of an image.
        count: tower layers up to the feature layer.

    Raises:
        ValueError: a layer that is not there, or feeds nothing.
    """
    if wrong := [layer for layer in wanted or () if layer > count]:
        raise ValueError(
            f"--layers {wrong[0]} is not allowed: features are read behind layer {count}, so it must be in 1 "
            f"to {count}"
        )
    if wanted:
        return sorted(set(wanted))
    last = 0
    for config in found.values():
        counts = config.lengths(config.patches_at(patches), count)
        last = max([last, *(i for i in range(1, count + 1) if counts[i] < counts[i - 1])])
    return sorted({-(-last * quarter // 4) for quarter in (1, 2, 3, 4)} - {0})
