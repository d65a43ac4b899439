"""The configs and layers that `draw` shows, from its options and a model's sizes alone."""

import argparse
import dataclasses
from typing import Any

from llava_pitome.config import SINGLE, MergeConfig, requested
from llava_pitome.config_validation import BUDGETS
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import schedule
from llava_pitome.methods import METHODS, PLACES
from llava_pitome.models import checkpoints

RATIO = 0.9  # where no option says how far to merge
LAYER = 1  # of the language model, for methods that merge there: after the second layer, as in FastV's paper


def method_configs(
    options: argparse.Namespace, patches: int, layers: int, layout: ImageLayout | None = None
) -> dict[str, MergeConfig]:
    """The config of each method by the name of its row; the checkpoint's own where no option changes it.

    A method that its paper places after the tower merges there, down to the number of tokens that the ratio
    leaves in the tower, unless the options name a place.

    Args:
        options: of the command.
        patches: of an image or tile.
        layers: of the tower, up to the feature layer.
        layout: of the image, where the model cuts it into tiles.

    Raises:
        ValueError: options that contradict each other, or do not fit the model or the image.
    """
    names = [f.name for f in dataclasses.fields(MergeConfig) if f.name != "method"]
    named = {k: v for k in names if (v := getattr(options, k, None)) is not None}
    merging, recipe = options.merging or {}, options.recipe
    if not (named or merging or options.method or recipe != "paper"):
        saved = checkpoints.saved_merge_config(options.model)
        if saved is not None:
            return _by_row([saved], "as saved", patches, layers, layout)
    has_place = (named.keys() | merging.keys()) & {"prefix", "decoder", "resize"}
    has_place |= merging.keys() & {"ratio", *BUDGETS}
    found = []
    for method in options.method or [None]:
        name, fields = method or merging.get("method", MergeConfig.method), dict(named)
        if not has_place and not fields.keys() & {"ratio", *BUDGETS}:
            fields["ratio"] = RATIO
        amount = {k: fields[k] for k in ("ratio", "tokens") if k in fields}
        if not has_place and amount and name in METHODS:  # MergeConfig refuses other names
            others = {k: v for k, v in fields.items() if k not in amount}
            fields = others | amount_in_own_place(name, amount, patches, layers, layout is not None)
        found.append(requested(recipe, fields | {"method": method}, merging))
    return _by_row(found, "" if recipe == "paper" else recipe, patches, layers, layout)


def amount_in_own_place(
    method: str, amount: dict[str, Any], patches: int, layers: int, has_tiles: bool = False
) -> dict[str, Any]:
    """How far a method merges in the place of its own paper, as fields of MergeConfig.

    Args:
        method: a name in METHODS.
        amount: ratio or tokens of the tower; another place keeps the number of tokens that it leaves.
        patches: of an image or tile.
        layers: of the tower, up to the feature layer.
        has_tiles: whether the model cuts images into tiles, so that the number depends on the image's size;
            another place then keeps the tokens, or the share that the ratio leaves of a tile.
    """
    place = METHODS[method].places[0]
    if place == PLACES[0]:
        return amount
    if has_tiles and "ratio" in amount:
        keep = MergeConfig(**amount).tokens_at(patches, layers) / patches
    else:
        tokens = amount["tokens"] if has_tiles else MergeConfig(**amount).tokens_at(patches, layers)
        keep = tokens if tokens > 1 else SINGLE  # the whole number 1 is ambiguous
    return {place: {LAYER: keep} if place == "decoder" else keep}


def _by_row(
    configs: list[MergeConfig], origin: str, patches: int, layers: int, layout: ImageLayout | None
) -> dict[str, MergeConfig]:
    """Configs by the names of their rows.

    Raises:
        ValueError: a config that does not fit the model or the image.
    """
    for config in configs:
        if layout is None:
            config.tokens_at(patches, layers)
        else:
            schedule(config, layout, layers)
    return {f"{c.method} ({origin})" if origin else c.method: c for c in configs}


def shown_layers(
    wanted: tuple[int, ...] | None,
    configs: dict[str, MergeConfig],
    patches: int,
    layers: int,
    layout: ImageLayout | None = None,
) -> list[int]:
    """The tower layers whose outputs are shown, from 1, ascending.

    By default the last layer in which any method merges, and those at a quarter, half and three quarters of
    the depth of it.

    Args:
        wanted: the layers that the options name; None: the default.
        configs: of the methods.
        patches: of an image or tile.
        layers: of the tower, up to the feature layer.
        layout: of the image, where the model cuts it into tiles.

    Raises:
        ValueError: a layer after the feature layer.
    """
    if wrong := [layer for layer in wanted or () if layer > layers]:
        raise ValueError(
            f"--layers {wrong[0]} is not allowed: features are read after layer {layers}, so it must be in 1 "
            f"to {layers}"
        )
    if wanted:
        return sorted(set(wanted))
    last = 0
    for config in configs.values():
        if layout is None:
            lengths = config.lengths(config.patches_at(patches), layers)
        else:
            lengths = schedule(config, layout, layers).lengths
        last = max([last, *(i for i in range(1, layers + 1) if lengths[i] < lengths[i - 1])])
    return sorted({-(-last * quarter // 4) for quarter in (1, 2, 3, 4)} - {0})
