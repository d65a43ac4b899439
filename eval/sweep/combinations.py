"""Every method in every place at every number of tokens, and why some combinations do not exist."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from eval.naming import INPUT, PITOME, RESIZE, THUMBNAIL, TOWER, UNMERGED, file_name
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import parameters_of

DECODER = "decoder"
FIXED_PLACES = (TOWER, "prefix", "tower+prefix")
PLACES = (*FIXED_PLACES, f"{DECODER}:1")  # by default
CONTROLS = (RESIZE, THUMBNAIL)
SHARES = (0.5, 0.3, 0.2, 0.1)  # of the patches that are kept, by default
TILED_SHARES = (*SHARES, 0.05)  # of the tokens that are kept, for models that cut images into tiles
PREFIX_SHARE = 0.5  # where tower and prefix divide the reduction
ROUNDING = 1e-9  # of a share of the patches


class Combination(NamedTuple):
    """One run of a sweep.

    Attributes:
        name: unique; also that of its folder.
        method: a name in METHODS or RECIPES, RECIPE:METHOD, "resize", "thumbnail" or "unmerged".
        place: where it merges; empty for the unmerged model.
        tokens: image tokens at which it is compared, a number or a share of an image's own; None for the
            unmerged model.
        seed: of a random method.
        recipe: a name in RECIPES.
        fields: of MergeConfig, instead of the recipe's; None for the unmerged model.
        skipped: why it does not run.
    """

    name: str
    method: str
    place: str = ""
    tokens: int | float | None = None
    seed: int | None = None
    recipe: str = "paper"
    fields: dict[str, Any] | None = None
    skipped: str | None = None

    @property
    def config(self) -> MergeConfig | None:
        """How it merges."""
        return None if self.fields is None else MergeConfig.recipe(self.recipe, **self.fields)


def combinations(
    methods: Sequence[str],
    places: Sequence[str],
    tokens: Sequence[int | float],
    seeds: Sequence[int],
    patches: int,
    is_tiled: bool = False,
) -> list[Combination]:
    """The unmerged model, then every combination once.

    Args:
        methods: names in METHODS or RECIPES, "resize", "thumbnail", or RECIPE:METHOD, a recipe with another
            method; as NAME@PLACE in that place only.
        places: of all others: "tower", "prefix", "tower+prefix", "decoder:K" with K a layer.
        tokens: image tokens to keep: numbers, or shares where images are cut into tiles.
        seeds: for random methods.
        patches: of an image, or of a tile.
        is_tiled: whether the model cuts images into tiles.

    Raises:
        ValueError: an unknown method or place, with the nearest name, or tokens out of range.
    """
    for kept in tokens:
        _check_tokens(kept, patches, is_tiled)
    known = (*METHODS, *RECIPES, *CONTROLS)
    wanted = []
    for word in methods:
        name, at, own_place = word.partition("@")
        recipe, _, method = name.partition(":")
        if name not in known and not (recipe in RECIPES and method in METHODS):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"method {name!r} is unknown; the nearest is {near!r}, of {', '.join(known)}")
        wanted.append((name, (INPUT,) if name in CONTROLS else (own_place,) if at else places))
        if at:
            _check_place(own_place)
    for place in places:
        _check_place(place)
    found = {UNMERGED: Combination(UNMERGED, UNMERGED)}
    for method, its_places in wanted:
        for place in its_places:
            for kept in tokens:
                name = PITOME if method == "paper" else method
                one = Combination(file_name(f"{name}-{place}-{kept}"), name, place, kept)
                made = [_control(one, patches)] if name in CONTROLS else _with_seeds(one, seeds)
                found |= {c.name: c for c in made}
    return list(found.values())


def _check_tokens(kept: int | float, patches: int, is_tiled: bool) -> None:
    """Raises ValueError for tokens that are out of range, or a number where a share is needed."""
    if is_tiled and not (isinstance(kept, float) and kept < 1):
        raise ValueError(
            f"tokens={kept} is not allowed: this model cuts images into tiles, and so they have different "
            "numbers of tokens; give the share to keep, in (0, 1), as tokens=0.1"
        )
    if not is_tiled and isinstance(kept, float):
        raise ValueError(
            f"tokens={kept} is not allowed: every image of this model has {patches} patches; give how many "
            f"tokens to keep, 1 to {patches - 1}"
        )
    if not is_tiled and not 1 <= kept < patches:
        raise ValueError(
            f"tokens={kept} does not fit: there are {patches} patches, allowed is 1 to {patches - 1}"
        )


def _check_place(place: str) -> None:
    """Raises ValueError for an unknown place."""
    kind, colon, layer = place.partition(":")
    if place not in FIXED_PLACES and not (kind == DECODER and colon and layer.isdecimal()):
        known = (*FIXED_PLACES, f"{DECODER}:K")
        near = difflib.get_close_matches(place, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"place {place!r} is unknown; the nearest is {near!r}, of {', '.join(known)} (K a layer)"
        )


def _control(one: Combination, patches: int) -> Combination:
    """A control with its fields: smaller images, or the thumbnail alone.

    Args:
        one: the combination without fields.
        patches: of an image, or of a tile.
    """
    is_share = isinstance(one.tokens, float)
    if one.method == THUMBNAIL:
        if not is_share:
            return one._replace(skipped="the images of this model have no thumbnail")
        return one._replace(fields={"tile_shares": "thumbnail", "tokens": one.tokens})
    if not is_share:
        return one._replace(fields={"resize": list(rectangle(one.tokens))})
    side = math.isqrt(math.floor(one.tokens * patches + ROUNDING))  # of every tile, a square
    if side == 0:
        return one._replace(skipped=f"less than one of a tile's {patches} patches is left")
    return one._replace(fields={"resize": [side, side]})


def _with_seeds(one: Combination, seeds: Sequence[int]) -> Iterator[Combination]:
    """A method in a place: once, or once per seed where it is random.

    Args:
        one: the combination without fields.
        seeds: for random methods.
    """
    method, place = one.method, one.place
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
    changes = changes | place_fields(place, one.tokens)
    if "seed" not in parameters_of(config.method):
        yield one._replace(recipe=recipe, fields=changes)
        return
    for seed in seeds:
        fields = changes | {"parameters": config.parameters | {"seed": seed}}
        yield one._replace(name=f"{one.name}-seed{seed}", seed=seed, recipe=recipe, fields=fields)


def place_fields(place: str, tokens: int | float) -> dict[str, Any]:
    """The fields of a config that keep `tokens` tokens, or that share of them, in a place.

    A number at the prefix is `prefix`; a share is a budget of the whole image, its newline tokens among it.
    """
    if place.startswith(DECODER):
        return {"decoder": {int(place.partition(":")[2]): tokens}}
    is_share = isinstance(tokens, float)
    return {
        TOWER: {"tokens": tokens},
        "prefix": {"tokens": tokens, "prefix_share": 1.0} if is_share else {"prefix": tokens},
        "tower+prefix": {"tokens": tokens, "prefix_share": PREFIX_SHARE},
    }[place]


def rectangle(tokens: int) -> tuple[int, int]:
    """The largest rows and columns, at most one apart, that hold no more than `tokens` patches."""
    rows = math.isqrt(tokens)
    return rows, min(tokens // rows, rows + 1)
