"""Names of methods, of the places where they merge, of evaluated models and of files."""

import re
from hashlib import sha256
from typing import Any

from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.methods import METHODS

PITOME, UNMERGED, BEST = "pitome", "unmerged", "best"  # the recipe paper is called pitome
RESIZE, THUMBNAIL = "resize", "thumbnail"  # controls: smaller images, and only the thumbnail of tiled ones
INPUT, TOWER = "input", "tower"  # places
TITLES = {
    PITOME: "PiToMe",
    "released": "PiToMe (released)",
    BEST: "PiToMe (best)",
    THUMBNAIL: "thumbnail only",
}
MAX_LENGTH = 150  # characters of a label in a file name; systems allow 255


def config_label(config: MergeConfig, changes: dict[str, Any]) -> str:
    """Where a config merges and how far, then the other fields among the `changes` that were given."""
    parts = []
    if config.tokens is not None:
        divided = " and at the prefix" if config.prefix_share else ""
        parts.append(
            f"tokens {config.tokens} "
            + ("at the prefix" if config.prefix_share == 1 else f"in the tower{divided}")
        )
    for name in ("tokens_per_tile", "tokens_per_frame", "tokens_per_video"):
        if (amount := getattr(config, name)) is not None:
            parts.append(f"{name} {amount}")
    if config.ratio is not None:
        parts.append(f"ratio {config.ratio} in the tower")
    if config.prefix is not None:
        parts.append(f"{config.prefix} at the prefix")
    parts += [f"{keep} at LLM layer {layer}" for layer, keep in config.decoder.items()]
    if config.resize is not None:
        parts.append(f"resized to {config.resize[0]} x {config.resize[1]}")
    named = ("method", "prefix_share", *AMOUNTS)
    return ", ".join(parts + [f"{name} {value}" for name, value in changes.items() if name not in named])


def place_of(config: MergeConfig) -> str:
    """Where a config merges: tower, prefix, tower+prefix, decoder:8, input, ..."""
    places = {INPUT: config.resize, TOWER: config.merges_in_tower, "prefix": config.merges_in_prefix}
    return "+".join([p for p, merges in places.items() if merges] + [f"decoder:{n}" for n in config.decoder])


def home_place(method: str) -> str:
    """The place of a method's own paper or recipe: tower, prefix, tower+prefix, decoder, input; "" if none.

    Args:
        method: as a sweep names it: in METHODS or RECIPES, RECIPE:METHOD, or a control, or "unmerged".
    """
    recipe = method.partition(":")[0]
    if recipe in RECIPES:
        return place_of(MergeConfig.recipe(recipe, tokens=1))
    return METHODS[method].places[0] if method in METHODS else INPUT if method in (RESIZE, THUMBNAIL) else ""


def place_phrase(place: str) -> str:
    """A place as part of a sentence."""
    phrases = {TOWER: "in the tower", "prefix": "at the prefix", INPUT: "at the input"}
    parts = [phrases.get(part) or f"at LLM layer {part.partition(':')[2]}" for part in place.split("+")]
    return " and ".join(parts)


def method_title(method: str) -> str:
    """A method's name in tables and sentences."""
    recipe, colon, other = method.partition(":")
    return f"{other} (with the settings of {recipe})" if colon else TITLES.get(method, method)


def amount(tokens: float) -> str:
    """Tokens that are kept: a number, or as a percentage where they are a share of an image's own."""
    return f"{100 * tokens:.6g} %" if isinstance(tokens, float) else str(tokens)


def amount_phrase(tokens: float) -> str:
    """Tokens that are kept as part of a sentence: "39 tokens", "10 % of tokens"."""
    return f"{amount(tokens)} of tokens" if isinstance(tokens, float) else f"{tokens} tokens"


def file_name(label: str) -> str:
    """A label as part of a file name; a long one is cut and ends in a hash of the full label."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")
    return (
        name if len(name) <= MAX_LENGTH else f"{name[:MAX_LENGTH]}-{sha256(label.encode()).hexdigest()[:8]}"
    )
