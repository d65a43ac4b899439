"""Every method in every place at every number of tokens, and why some are not there."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eval.labels import INPUT, RESIZE, slug
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import parameters_of

REFERENCE, UNMERGED = "pitome", "unmerged"  # "paper" is another name of the first
DECODER = "decoder"
PLACES = ("tower", "prefix", "tower+prefix", f"{DECODER}:1")  # by default
SHARES = (0.5, 0.3, 0.2, 0.1)  # of the patches that stay, by default
BOTH = 0.5  # part of the reduction left to the prefix where tower and prefix share it


class Combination(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: its own, also of its folder.
        method: a name in METHODS or RECIPES, RECIPE:METHOD, "resize" or "unmerged".
        place: where it merges; empty for the unmerged model.
        tokens: image tokens at which it is compared; None for the unmerged model.
        seed: of the draw, for methods that draw.
        recipe: a name in RECIPES.
        fields: of MergeConfig, instead of the recipe's; None for the unmerged model.
        skipped: why it does not run.
    """

    name: str
    method: str
    place: str = ""
    tokens: int | None = None
    seed: int | None = None
    recipe: str = "paper"
    fields: dict[str, Any] | None = None
    skipped: str | None = None

    @property
    def config(self) -> MergeConfig | None:
        """How it merges."""
        return None if self.fields is None else MergeConfig.recipe(self.recipe, **self.fields)


def every(
    methods: Sequence[str], places: Sequence[str], tokens: Sequence[int], seeds: Sequence[int], patches: int
) -> list[Combination]:
    """The unmerged model, and every combination of what is given, each once.

    Args:
        methods: names in METHODS or RECIPES, "resize", or RECIPE:METHOD, a recipe with another method; each
            of them NAME@PLACE where it is to merge in one place alone.
        places: of all others: "tower", "prefix", "tower+prefix", "decoder:K" with K a layer.
        tokens: that are to be left of the patches.
        seeds: for methods that draw.
        patches: of an image.

    Raises:
        ValueError: an unknown method or place, with the nearest name, or tokens that do not fit.
    """
    for count in tokens:
        if not 1 <= count < patches:
            raise ValueError(
                f"tokens={count} does not fit: there are {patches} patches, allowed is 1 to {patches - 1}"
            )
    known = (*METHODS, *RECIPES, RESIZE)
    asked = []
    for word in methods:
        name, at, place = word.partition("@")
        if name not in known and not _borrowed(name):
            raise ValueError(
                f"method {name!r} is unknown; the nearest is {_nearest(name, known)!r}, of {', '.join(known)}"
            )
        asked.append((name, (INPUT,) if name == RESIZE else (place,) if at else places))
        if at:
            _check(place)
    for place in places:
        _check(place)
    found = {UNMERGED: Combination(UNMERGED, UNMERGED)}
    for method, spots in asked:
        for place in spots:
            for count in tokens:
                found |= {
                    c.name: c for c in _draws(REFERENCE if method == "paper" else method, place, count, seeds)
                }
    return list(found.values())


def _borrowed(name: str) -> bool:
    """Whether a name is RECIPE:METHOD."""
    recipe, _, method = name.partition(":")
    return recipe in RECIPES and method in METHODS


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _check(place: str) -> None:
    """Raises ValueError for a place that is none."""
    kind, colon, layer = place.partition(":")
    if (kind == DECODER and colon and layer.isdecimal()) or place in ("tower", "prefix", "tower+prefix"):
        return
    known = ("tower", "prefix", "tower+prefix", f"{DECODER}:K")
    near = _nearest(place, known)
    raise ValueError(
        f"place {place!r} is unknown; the nearest is {near!r}, of {', '.join(known)} (K a layer)"
    )


def _draws(method: str, place: str, tokens: int, seeds: Sequence[int]) -> Iterator[Combination]:
    """A method in a place: once, or once a seed where it draws."""
    one = Combination(slug(f"{method}-{place}-{tokens}"), method, place, tokens)
    if method == RESIZE:
        yield one._replace(fields={"resize": list(rectangle(tokens))})
        return
    recipe, own = method, {}
    if method not in RECIPES:
        lent, _, name = method.rpartition(":")
        recipe, own = lent or "paper", {"method": name} | ({"parameters": {}} if lent else {})
    used = MergeConfig.recipe(recipe, ratio=1.0, **own)
    places = METHODS[used.method].places
    if any(part.partition(":")[0] not in places for part in place.split("+")):
        yield one._replace(skipped=f"not defined there: {used.method} fits {' and '.join(places)}")
        return
    if place == "tower" and used.prefix_share:
        own = own | {"prefix_share": 0.0}
    drawn = seeds if "seed" in parameters_of(used.method) else (None,)
    for seed in drawn:
        draw = {} if seed is None else {"parameters": used.parameters | {"seed": seed}}
        name = one.name if seed is None else f"{one.name}-seed{seed}"
        yield one._replace(name=name, seed=seed, recipe=recipe, fields=own | draw | amounts(place, tokens))


def amounts(place: str, tokens: int) -> dict[str, Any]:
    """The fields of a config that leave `tokens` in a place."""
    if place.startswith(DECODER):
        return {"decoder": {int(place.partition(":")[2]): tokens}}
    return {
        "tower": {"tokens": tokens},
        "prefix": {"prefix": tokens},
        "tower+prefix": {"tokens": tokens, "prefix_share": BOTH},
    }[place]


def rectangle(tokens: int) -> tuple[int, int]:
    """The largest rows and columns, at most one apart, that hold no more than `tokens` patches."""
    rows = math.isqrt(tokens)
    return rows, min(tokens // rows, rows + 1)
