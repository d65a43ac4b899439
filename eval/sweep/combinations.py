"""Every method in every place at every number of tokens, and why some combinations do not exist."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eval.naming import INPUT, PITOME, RESIZE, TOWER, UNMERGED, file_name
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import parameters_of

DECODER = "decoder"
FIXED_PLACES = (TOWER, "prefix", "tower+prefix")
PLACES = (*FIXED_PLACES, f"{DECODER}:1")  # by default
SHARES = (0.5, 0.3, 0.2, 0.1)  # of the patches that are kept, by default
PREFIX_SHARE = 0.5  # where tower and prefix divide the reduction


class Combination(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: unique; also that of its folder.
        method: a name in METHODS or RECIPES, RECIPE:METHOD, "resize" or "unmerged".
        place: where it merges; empty for the unmerged model.
        tokens: image tokens at which it is compared; None for the unmerged model.
        seed: of a random method.
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


def combinations(
    methods: Sequence[str], places: Sequence[str], tokens: Sequence[int], seeds: Sequence[int], patches: int
) -> list[Combination]:
    """The unmerged model, then every combination once.

    Args:
        methods: names in METHODS or RECIPES, "resize", or RECIPE:METHOD, a recipe with another method; as
            NAME@PLACE in that place only.
        places: of all others: "tower", "prefix", "tower+prefix", "decoder:K" with K a layer.
        tokens: numbers of image tokens to keep.
        seeds: for random methods.
        patches: of an image.

    Raises:
        ValueError: an unknown method or place, with the nearest name, or a number of tokens out of range.
    """
    for count in tokens:
        if not 1 <= count < patches:
            raise ValueError(
                f"tokens={count} does not fit: there are {patches} patches, allowed is 1 to {patches - 1}"
            )
    known = (*METHODS, *RECIPES, RESIZE)
    wanted = []
    for word in methods:
        name, at, own_place = word.partition("@")
        recipe, _, method = name.partition(":")
        if name not in known and not (recipe in RECIPES and method in METHODS):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"method {name!r} is unknown; the nearest is {near!r}, of {', '.join(known)}")
        wanted.append((name, (INPUT,) if name == RESIZE else (own_place,) if at else places))
        if at:
            _check_place(own_place)
    for place in places:
        _check_place(place)
    found = {UNMERGED: Combination(UNMERGED, UNMERGED)}
    for method, its_places in wanted:
        for place in its_places:
            for count in tokens:
                for c in _with_seeds(PITOME if method == "paper" else method, place, count, seeds):
                    found[c.name] = c
    return list(found.values())


def _check_place(place: str) -> None:
    """Raises ValueError for an unknown place."""
    kind, colon, layer = place.partition(":")
    if place not in FIXED_PLACES and not (kind == DECODER and colon and layer.isdecimal()):
        known = (*FIXED_PLACES, f"{DECODER}:K")
        near = difflib.get_close_matches(place, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"place {place!r} is unknown; the nearest is {near!r}, of {', '.join(known)} (K a layer)"
        )


def _with_seeds(method: str, place: str, tokens: int, seeds: Sequence[int]) -> Iterator[Combination]:
    """A method in a place: once, or once per seed where it is random."""
    one = Combination(file_name(f"{method}-{place}-{tokens}"), method, place, tokens)
    if method == RESIZE:
        yield one._replace(fields={"resize": list(rectangle(tokens))})
        return
    recipe, changes = method, {}
    if method not in RECIPES:
        own_recipe, _, name = method.rpartition(":")
        recipe = own_recipe or "paper"
        changes = {"method": name} | ({"parameters": {}} if own_recipe else {})
    config = MergeConfig.recipe(recipe, ratio=1.0, **changes)
    places = METHODS[config.method].places
    if any(part.partition(":")[0] not in places for part in place.split("+")):
        yield one._replace(skipped=f"not defined there: {config.method} fits {' and '.join(places)}")
        return
    if place == TOWER and config.prefix_share:
        changes = changes | {"prefix_share": 0.0}
    changes = changes | place_fields(place, tokens)
    if "seed" not in parameters_of(config.method):
        yield one._replace(recipe=recipe, fields=changes)
        return
    for seed in seeds:
        fields = changes | {"parameters": config.parameters | {"seed": seed}}
        yield one._replace(name=f"{one.name}-seed{seed}", seed=seed, recipe=recipe, fields=fields)


def place_fields(place: str, tokens: int) -> dict[str, Any]:
    """The fields of a config that keep `tokens` tokens in a place."""
    if place.startswith(DECODER):
        return {"decoder": {int(place.partition(":")[2]): tokens}}
    return {
        TOWER: {"tokens": tokens},
        "prefix": {"prefix": tokens},
        "tower+prefix": {"tokens": tokens, "prefix_share": PREFIX_SHARE},
    }[place]


def rectangle(tokens: int) -> tuple[int, int]:
    """The largest rows and columns, at most one apart, that hold no more than `tokens` patches."""
    rows = math.isqrt(tokens)
    return rows, min(tokens // rows, rows + 1)
