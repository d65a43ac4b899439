"""MergeConfig: everything that changes a number, as one frozen value that is saved with the model."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llava_pitome import config_validation as validation
from llava_pitome.config_validation import FrozenDict, frozen
from llava_pitome.plain_values import plain
from llava_pitome.saved_config import FILE, KEY, saved_configs, to_tag, write_config
from llava_pitome.token_schedule import TokenCounts

VERSION = 2  # of the saved form; 1 is llava_pitome 0.1
SINGLE = 1e-9  # a share that leaves one token of any number: what version 1 wrote as the whole number 1

Metric = Literal["keys", "hidden"]
PrefixMetric = Literal["features", "keys"]
Site = Literal["attention", "block"]
Order = Literal["raster", "method"]
Positions = Literal["packed", "original"]
Newlines = Literal["rows", "scaled", "none"]
TileShares = Literal["area", "equal", "joint", "attention", "thumbnail"]
Recipe = Literal["paper", "released", "best"]

RECIPES: dict[str, dict[str, Any]] = {  # what a config holds besides how far it merges
    "paper": {},
    "released": {
        "parameters": {"energy": "elu"},
        "early_method": "tome",
        "early_depth": 13 / 24,  # layers 0 to 12 of CLIP-L's 24
        "metric": "hidden",
        "site": "block",
        "size_weighted": False,
        "proportional": False,
        "order": "method",
    },
    "best": {  # eval/results/search.json: the last three fields were given to eval/search.py as its start
        "parameters": {"candidates": 6.0},
        "prefix_share": 0.5,
        "llm_proportional": True,
        "positions": "original",
    },
}


def _field(default: Any, kind: str, group: str, help: str, choices: Any = None) -> Any:
    """A field with its one description, from which checks, help texts and command-line options are made.

    Args:
        default: its value where it is not given; a dict becomes a factory.
        kind: how it is read and checked, a name in `config_validation.KINDS`.
        group: its heading in help texts.
        help: what it does.
        choices: the Literal that lists what is allowed, for kind="choice".
    """
    metadata = {"kind": kind, "group": group, "help": help, "choices": get_args(choices) if choices else ()}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=FrozenDict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MergeConfig(TokenCounts):
    """How visual tokens merge: in the vision tower, after the projector (prefix), in the language model.

    Say how far with `ratio` or `tokens` (the tower), `prefix`, `decoder`, `resize`, or several of them; a
    place that is not named merges nothing. Configs are hashable and immutable, and are saved with the model
    as `model.config.token_merging`.

    Raises:
        ValueError: a value out of its range, an unknown name, values that contradict each other, or a method
            in a place for which it is not defined.
    """

    ratio: float | tuple[float, ...] | None = _field(
        None,
        "shares",
        "how far",
        "share of the patches that each tower layer keeps, in (0, 1]; or one share per layer up to the "
        "feature layer. 1.0 merges nothing",
    )
    tokens: int | float | None = _field(
        None,
        "budget",
        "how far",
        "tokens of an image at the input of the language model, instead of ratio, which is then solved for "
        "each image size; of all its tiles and newline tokens together, where a model has those. Below 1, "
        "the share of the tokens that the image has without merging",
    )
    tokens_per_tile: int | None = _field(
        None,
        "count",
        "how far",
        "tokens of each whole tile of an image, for models that cut images into tiles; newline tokens are "
        "not counted",
    )
    tokens_per_frame: int | None = _field(
        None, "count", "how far", "tokens of each frame of a video; a newline token is not counted"
    )
    tokens_per_video: int | None = _field(
        None, "count", "how far", "tokens of a whole video at the input of the language model"
    )
    prefix: float | int | None = _field(
        None,
        "amount",
        "how far",
        "merges once after the projector: the share that is kept, or the number of tokens",
    )
    decoder: dict[int, float | int] = _field(
        {},
        "layers",
        "how far",
        "language model layers that merge the image tokens during prefill, each with the share or the number "
        "that is kept; the KV cache of later layers is shorter",
    )
    resize: tuple[int, int] | None = _field(
        None,
        "sides",
        "how far",
        "rows and columns of patches to which images are resized before the vision tower",
    )
    method: str = _field("pitome", "method", "method", "which tokens merge into which, a name in METHODS")
    parameters: dict[str, Any] = _field({}, "json", "method", "the method's own parameters")
    early_method: str | None = _field(
        None,
        "method",
        "method",
        "another method for the first tower layers, up to early_depth",
    )
    early_depth: float = _field(
        0.0, "fraction", "method", "share of the tower's layers, in [0, 1], that early_method takes"
    )
    metric: Metric = _field(
        "keys",
        "choice",
        "method",
        "what similarity is measured on in a layer: the attention keys averaged over heads (the paper), or "
        "the hidden states that are merged",
        Metric,
    )
    size_weighted: bool = _field(
        True,
        "flag",
        "method",
        "average tokens weighted by the patches they stand for (the paper) instead of plainly",
    )
    order: Order = _field(
        "raster",
        "choice",
        "method",
        "raster keeps tokens in raster order; method uses the order of the method's authors. In the language "
        "model the order is always kept",
        Order,
    )
    site: Site = _field(
        "attention",
        "choice",
        "vision tower",
        "where in a layer tokens merge: between attention and MLP (the paper), or after the block",
        Site,
    )
    proportional: bool = _field(
        True,
        "flag",
        "vision tower",
        "add the log sizes of tokens to the attention scores of later tower layers (the paper)",
    )
    depths: tuple[float, float] = _field(
        (0.0, 1.0),
        "interval",
        "vision tower",
        "part of the tower whose layers share tokens, or a single ratio; 0,1 is all of it",
    )
    prefix_share: float = _field(
        0.0,
        "fraction",
        "after the projector",
        "part of the reduction (of its logarithm) that is left to the merge after the projector; tokens, or "
        "what a single ratio would leave, still reach the language model",
    )
    prefix_metric: PrefixMetric | None = _field(
        None,
        "choice",
        "after the projector",
        "what similarity is measured on after the projector: the projected features, or the keys of the "
        "tower's last layer; by default what the method's paper uses",
        PrefixMetric,
    )
    newlines: Newlines = _field(
        "rows",
        "choice",
        "tiles and frames",
        "newline tokens that stay where a model puts one after each row of an image: one a row (rows), as "
        "many as rows of fewer tokens would have (scaled), or none",
        Newlines,
    )
    tile_shares: TileShares = _field(
        "area",
        "choice",
        "tiles and frames",
        "how a budget is divided among thumbnail and tiles: by the patches that show the image (area), to "
        "all tiles alike (equal), by one merge over all of them (joint), by the thumbnail's class attention "
        "(attention), or to the thumbnail alone (thumbnail)",
        TileShares,
    )
    across_tiles: bool = _field(
        True,
        "flag",
        "tiles and frames",
        "after the projector, tokens of different tiles of an image may merge",
    )
    temporal: bool = _field(
        False,
        "flag",
        "tiles and frames",
        "after the projector, tokens of different frames of a video may merge, those at the same place in "
        "neighbouring frames first",
    )
    llm_proportional: bool = _field(
        False,
        "flag",
        "language model",
        "add the log sizes of image tokens to the attention scores of the language model",
    )
    positions: Positions = _field(
        "packed",
        "choice",
        "language model",
        "position ids in the language model: packed counts the tokens that are left; original gives each "
        "token, image or text, the position it has without merging",
        Positions,
    )

    def __post_init__(self) -> None:
        """Freezes and checks every field."""
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, frozen(getattr(self, f.name)))  # lists and dicts, as from JSON
        for name in ("parameters", "decoder"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be a dict")
        object.__setattr__(self, "decoder", FrozenDict(validation.layers(self.decoder)))
        validation.check(self)

    @classmethod
    def recipe(cls, name: Recipe, /, **changes: Any) -> "MergeConfig":
        """The config of a named recipe, with `ratio=` or `tokens=` and any other field changed.

        Where the changes say by `prefix`, `decoder` or `resize` alone how far to merge, the recipe's
        prefix_share does not apply.

        "paper": the equations. "released": what the authors' LLaVA branch computes instead. "best": the best
        settings found on the embedded benchmark's training images.

        Raises:
            ValueError: an unknown recipe or field.
        """
        if not isinstance(name, str) or name not in RECIPES:
            raise ValueError(f"recipe={name!r} is unknown; allowed are {', '.join(RECIPES)}")
        changes = {k: frozen(v) for k, v in changes.items() if v is not None}
        fields = RECIPES[name] | changes
        other = changes.get("method", cls.method) != RECIPES[name].get("method", cls.method)
        if other and "parameters" not in changes:
            fields.pop("parameters", None)  # they are another method's
        divides = bool(changes.keys() & set(validation.BUDGETS)) or not isinstance(
            changes.get("ratio", ()), tuple | list
        )
        if not divides or "prefix" in changes:
            fields |= {"prefix_share": changes.get("prefix_share", 0.0)}  # nothing is left to divide
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MergeConfig":
        """The config of a dict, as `to_dict` or JSON gives it; also of version 1, as 0.1 saved it.

        Raises:
            ValueError: values that are no dict, a key that is no field (the nearest one is named), or an
                unknown version.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"a merge config cannot be {values!r}: it must be a dict of fields of MergeConfig"
            )
        values = dict(values)
        version = plain(values.pop("version", VERSION))
        if isinstance(version, bool) or version not in range(1, VERSION + 1):
            raise ValueError(
                f"token_merging has version {version!r}; this llava_pitome reads versions 1 to {VERSION}"
            )
        _check_names(values)
        return cls(**(_from_version_1(values) if version == 1 else values))

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values that JSON can hold, stamped with its version."""
        return json.loads(json.dumps({"version": VERSION} | dataclasses.asdict(self)))

    def changes(self) -> dict[str, Any]:
        """The fields that differ from their defaults, in plain values, as `from_dict` takes them."""
        defaults = {
            f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(self)
        }
        return {k: v for k, v in self.to_dict().items() if k in defaults and getattr(self, k) != defaults[k]}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the config to `folder`/token_merging.json, where `from_pretrained` and `load` find it.

        It replaces one that peft wrote into the model card of an adapter.
        """
        write_config(Path(folder), self.to_dict(), self.tag())

    def tag(self) -> str:
        """The config as a tag of a model card."""
        return to_tag({"version": VERSION} | self.changes())

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub: Any) -> "MergeConfig":
        """The config saved in a folder or hub repository.

        It is in token_merging.json or in config.json, of an adapter also in a tag of its model card.

        Args:
            path: a folder, or a hub id (which needs huggingface_hub).
            **hub: as for `huggingface_hub.hf_hub_download`: revision, token, cache_dir, ...

        Raises:
            ValueError: there is no saved config, there are two that differ, or one that `from_dict` refuses.
        """
        found = saved(path, **hub)
        if found is None:
            raise ValueError(f"{path} holds no merge config: neither {FILE} nor {KEY!r} in config.json")
        return found

    def method_at(self, depth: float) -> tuple[str, dict[str, Any]]:
        """The method and its parameters in the tower at a depth l_i / l in [0, 1)."""
        if self.early_method is not None and depth < self.early_depth:
            return self.early_method, {}
        return self.method, self.parameters


MergeConfig.__doc__ += "\n    Attributes:\n" + "".join(
    f"        {f.name}: {f.metadata['help']}.\n" for f in dataclasses.fields(MergeConfig)
)


def _check_names(values: dict[str, Any]) -> None:
    """Raises ValueError for a key that is no field of MergeConfig; the nearest one is named."""
    known = [f.name for f in dataclasses.fields(MergeConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"MergeConfig has no field {key!r}; the nearest is {near!r}")


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Fields as version 2 takes them: the whole number 1, for one token, is ambiguous since."""

    def single(keep: Any) -> Any:
        keep = plain(keep)
        return SINGLE if type(keep) is int and keep == 1 else keep

    if "prefix" in values:
        values = values | {"prefix": single(values["prefix"])}
    if isinstance(values.get("decoder"), dict):
        values = values | {"decoder": {k: single(v) for k, v in values["decoder"].items()}}
    return values


def saved(path: str | Path, **hub: Any) -> MergeConfig | None:
    """The config saved in a folder or hub repository; None where there is none.

    Args:
        path: a folder or a hub id.
        **hub: as for `MergeConfig.from_pretrained`.

    Raises:
        ValueError: an adapter's two records differ, or `MergeConfig.from_dict` refuses one.
    """
    try:
        found = list(dict.fromkeys(map(MergeConfig.from_dict, saved_configs(path, **hub))))
    except ValueError as error:
        raise ValueError(f"the merge config of {path} cannot be read: {error}") from error
    if len(found) > 1:
        listed = "; ".join(json.dumps(config.changes()) for config in found)
        raise ValueError(
            f"{path} holds merge configs that differ, in {FILE} and in the tags of its model card: {listed}. "
            "Give a config, or write the right one with MergeConfig.save_pretrained"
        )
    return found[0] if found else None


def requested(recipe: str, named: dict[str, Any], merging: dict[str, Any] | None) -> MergeConfig | None:
    """The config that a recipe and changes to it ask for; None where nothing is to merge.

    Args:
        recipe: a name in RECIPES.
        named: fields that have an option of their own; None: not given.
        merging: further fields.

    Raises:
        ValueError: it says how to merge but not how far, a field is given twice, or `MergeConfig` refuses.
    """
    changes = combined(named, merging)
    _check_names({k: v for k, v in changes.items() if k != "version"})
    if changes.keys() & set(validation.AMOUNTS):
        return MergeConfig.recipe(recipe, **changes)
    if changes or recipe != "paper":
        raise ValueError(
            f"recipe={recipe!r} with {changes} says how to merge but not how far: give one of "
            f"{', '.join(validation.AMOUNTS)}"
        )
    return None


def combined(named: dict[str, Any], merging: dict[str, Any] | None) -> dict[str, Any]:
    """Fields from options of their own (None: not given) and from a dict of further ones, as one dict.

    Raises:
        ValueError: a field is given twice.
    """
    merging, named = merging or {}, {k: v for k, v in named.items() if v is not None}
    if twice := named.keys() & merging.keys():
        raise ValueError(f"{', '.join(sorted(twice))} is given in merging and beside it; give it once")
    return merging | named
