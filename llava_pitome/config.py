"""MergeConfig: everything that changes a number, in one frozen value that goes with the model."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from llava_pitome import config_validation as validation
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.counts import Counts
from llava_pitome.recipes import RECIPES

VERSION = 1  # of the saved form


@dataclass(frozen=True)
class MergeConfig(Counts):
    """How visual tokens merge, in the tower, behind the projector (prefix), and in the language model.

    Say how far with `ratio` or `tokens` (the tower), `prefix`, `decoder`, `resize`, or several of them; a
    place that is not named merges nothing. Every field is saved with the model as
    `model.config.token_merging`.

    Attributes:
        ratio: share of the patches that each tower layer keeps, in (0, 1]; or one share per layer up to the
            feature layer, as a tuple. 1.0 merges nothing.
        tokens: image tokens that are to reach the language model; the ratio is then solved for each image
            size.
        method: who joins whom, a name in METHODS.
        parameters: the method's own, as in its file.
        early_method: another method for the first layers, up to the share `early_depth` of the encoder; None
            for one method throughout.
        early_depth: share of the encoder's layers, in [0, 1], that `early_method` takes.
        metric: what similarity is measured on in a layer: "keys", the block's attention keys averaged over
            heads (the paper), or "hidden", the hidden state that is merged.
        site: where in a layer tokens merge: "attention", between attention and MLP (the paper), or "block",
            behind the whole block.
        size_weighted: average tokens by the patches that they stand for (the paper) instead of plainly.
        proportional: add log size to the attention scores of later tower layers (the paper).
        order: "raster" keeps survivors where they were; "method" lays them out as the method's authors do.
            Inside the language model they always stay where they were.
        depths: the part of the tower whose layers share `tokens`, or a single `ratio`: (0, 1) is all of it.
        prefix: merges once more behind the projector: the share in (0, 1] that stays, or, as a whole number,
            how many tokens.
        prefix_share: the part of the reduction (of its logarithm) that is left to the prefix; `tokens`, or
            what a single `ratio` would leave, then reach the language model all the same.
        prefix_metric: what similarity is measured on there: "features", as they come from the projector, or
            "keys", those of the tower's last layer; None is what the method's paper says.
        decoder: language model layers that merge the image's tokens during prefill, each with the share or
            the number that stays; the KV cache of the layers behind is shorter. {8: 0.5, 16: 0.5}.
        llm_proportional: add log size to the scores of image tokens in the language model's attention.
        positions: in the language model, "packed" counts image tokens through, as they arrive; "original"
            gives each the position that its patch would have without merging, and the text its own too.
        resize: rows and columns of patches to which a picture is shrunk in front of the tower.

    Raises:
        ValueError: a value out of its range, an unknown name, values that do not go together, or a method in
            a place where its definition makes no sense.
    """

    ratio: float | tuple[float, ...] | None = None
    tokens: int | None = None
    method: str = "pitome"
    parameters: dict[str, Any] = field(default_factory=dict)
    early_method: str | None = None
    early_depth: float = 0.0
    metric: str = "keys"
    site: str = "attention"
    size_weighted: bool = True
    proportional: bool = True
    order: str = "raster"
    depths: tuple[float, float] = (0.0, 1.0)
    prefix: float | int | None = None
    prefix_share: float = 0.0
    prefix_metric: str | None = None
    decoder: dict[int, float | int] = field(default_factory=dict)
    llm_proportional: bool = False
    positions: str = "packed"
    resize: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Checks every field where the value is made."""
        for name in ("ratio", "depths", "resize"):
            if isinstance(getattr(self, name), list):  # as JSON brings it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("parameters", "decoder"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be a dict")
            object.__setattr__(self, name, dict(getattr(self, name)))  # nobody else's to change
        object.__setattr__(self, "decoder", validation.layers(self.decoder))
        validation.check(self)

    @classmethod
    def recipe(cls, name: str, /, **changes: Any) -> "MergeConfig":
        """The config of a named recipe, with `ratio=` or `tokens=` and any other field changed.

        Where the changes say by `prefix`, `decoder` or `resize` alone how far to merge, nothing of a budget
        is left to the prefix.

        "paper": the equations. "released": what the authors' LLaVA branch computes instead. "best": what was
        found best on the embedded benchmark's training pictures.

        Raises:
            ValueError: an unknown recipe or field.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe={name!r} is unknown; allowed are {', '.join(RECIPES)}")
        changes = {k: v for k, v in changes.items() if v is not None}
        fields = RECIPES[name] | changes
        other = changes.get("method", cls.method) != RECIPES[name].get("method", cls.method)
        if other and "parameters" not in changes:
            fields.pop("parameters", None)  # they are another method's
        divides = "tokens" in changes or not isinstance(changes.get("ratio", ()), tuple | list)
        if not divides or "prefix" in changes:
            fields |= {"prefix_share": changes.get("prefix_share", 0.0)}  # nothing is left to divide
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MergeConfig":
        """The config of a dict, as `to_dict` or JSON gives it.

        Raises:
            ValueError: a key that is no field (the nearest one is named), or a version this package cannot
                read.
        """
        values = dict(values)
        if (version := values.pop("version", VERSION)) != VERSION:
            raise ValueError(
                f"token_merging has version {version!r}; this llava_pitome reads version {VERSION}"
            )
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"MergeConfig has no field {key!r}; the nearest is {near!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A dict of plain values that survives JSON, stamped with its version."""
        return json.loads(json.dumps({"version": VERSION} | dataclasses.asdict(self)))

    def changes(self) -> dict[str, Any]:
        """The fields that are not their defaults, in plain values, as `from_dict` takes them."""
        plain = {
            f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(self)
        }
        return {k: v for k, v in self.to_dict().items() if k in plain and getattr(self, k) != plain[k]}

    def method_at(self, depth: float) -> tuple[str, dict[str, Any]]:
        """The method and its parameters in the tower at a depth l_i / l in [0, 1)."""
        if self.early_method is not None and depth < self.early_depth:
            return self.early_method, {}
        return self.method, self.parameters


def asked(recipe: str, named: dict[str, Any], merging: dict[str, Any] | None) -> MergeConfig | None:
    """The config that someone asks for by a recipe and what changes it; None where nothing is to merge.

    Args:
        recipe: a name in RECIPES.
        named: fields that have an option of their own; None: not given.
        merging: further fields.

    Raises:
        ValueError: it says how to merge but not how far, a field is given twice, or `MergeConfig` refuses.
    """
    changes = joined(named, merging)
    if changes.keys() & set(AMOUNTS):
        return MergeConfig.recipe(recipe, **changes)
    if changes or recipe != "paper":
        raise ValueError(
            f"recipe={recipe!r} with {changes} says how to merge but not how far: give one of "
            f"{', '.join(AMOUNTS)}"
        )
    return None


def joined(named: dict[str, Any], merging: dict[str, Any] | None) -> dict[str, Any]:
    """The fields that someone gives by an option of their own, None where not given, and the further ones.

    Raises:
        ValueError: a field is given twice.
    """
    merging, named = merging or {}, {k: v for k, v in named.items() if v is not None}
    if twice := named.keys() & merging.keys():
        raise ValueError(f"{', '.join(sorted(twice))} stands in merging and beside it; give it once")
    return merging | named
