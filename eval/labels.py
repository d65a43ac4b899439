"""What is written beside a number: which method merged what, where, and how far."""

import re
from hashlib import sha256
from typing import Any

from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.methods import METHODS

LONGEST = 150  # letters of a label in a file's name; systems allow 255 with all that stands around it
INPUT, RESIZE = "input", "resize"
SAID = ("method", "prefix_share", *AMOUNTS)  # fields that the rest of a label tells


def where(config: MergeConfig, further: dict[str, Any]) -> str:
    """Where a config merges and how far, and the `further` fields that were asked for by name."""
    parts = []
    if config.tokens is not None:
        parts.append(f"tokens {config.tokens} {_shared(config)}")
    if config.ratio is not None:
        parts.append(f"ratio {config.ratio} in the tower")
    if config.prefix is not None:
        parts.append(f"{config.prefix} at the prefix")
    parts += [f"{keep} at LLM layer {layer}" for layer, keep in config.decoder.items()]
    if config.resize is not None:
        parts.append(f"resized to {config.resize[0]} x {config.resize[1]}")
    return ", ".join(parts + [f"{name} {value}" for name, value in further.items() if name not in SAID])


def _shared(config: MergeConfig) -> str:
    """Where `tokens` is reached."""
    if config.prefix_share == 1:
        return "at the prefix"
    return "in the tower" + (" and at the prefix" if config.prefix_share else "")


def merges(config: MergeConfig) -> bool:
    """Whether any tokens merge, and not only pictures shrink."""
    return bool(config.merges_in_tower or config.merges_in_prefix or config.decoder)


def place(config: MergeConfig) -> str:
    """One name for where a config merges: tower, prefix, tower+prefix, decoder:8, input, ..."""
    named = [INPUT] if config.resize is not None else []
    named += ["tower"] if config.merges_in_tower else []
    named += ["prefix"] if config.merges_in_prefix else []
    named += [f"decoder:{layer}" for layer in config.decoder]
    return "+".join(named)


def home(method: str) -> str:
    """Where a method's own paper or recipe merges: tower, prefix, tower+prefix, decoder, input or nowhere.

    Args:
        method: as a sweep names it: in METHODS or RECIPES, RECIPE:METHOD, "resize" or "unmerged".
    """
    recipe = method.partition(":")[0]
    if recipe in RECIPES:
        return place(MergeConfig.recipe(recipe, tokens=1))
    return METHODS[method].places[0] if method in METHODS else {RESIZE: INPUT}.get(method, "")


def spot(place: str) -> str:
    """A place in the middle of a sentence."""
    known = {"tower": "in the tower", "prefix": "at the prefix", "input": "on smaller pictures"}
    said = [known.get(part) or f"at LLM layer {part.partition(':')[2]}" for part in place.split("+")]
    return " and ".join(said)


def slug(label: str) -> str:
    """A label as part of a file name; a long one is cut, with a hash of all of it behind."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{sha256(label.encode()).hexdigest()[:8]}"
