"""MergeConfig: everything that changes a number, in one frozen value that goes with the model."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from llava_pitome import schedule
from llava_pitome.methods import METHODS, check

METRICS = ("keys", "hidden")
SITES = ("attention", "block")
ORDERS = ("raster", "method")
VERSION = 1  # of the saved form


@dataclass(frozen=True)
class MergeConfig:
    """How visual tokens merge.

    Give `ratio` or `tokens`, not both. Every field is saved with the model as `model.config.token_merging`.

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
        metric: what similarity is measured on: "keys", the block's attention keys averaged over heads (the
            paper), or "hidden", the hidden state that is merged.
        site: where in a block tokens merge: "attention", between attention and MLP (the paper), or "block",
            behind the whole block.
        size_weighted: average tokens by the patches that they stand for (the paper) instead of plainly.
        proportional: add log size to the attention scores of later layers (the paper).
        order: "raster" keeps survivors where they were; "method" lays them out as the method's authors do.

    Raises:
        ValueError: a value out of its range, an unknown name, or both `ratio` and `tokens`.
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

    def __post_init__(self) -> None:
        """Checks every field where the value is made."""
        if (self.ratio is None) == (self.tokens is None):
            raise ValueError(
                f"give ratio or tokens, and not both: ratio={self.ratio!r}, tokens={self.tokens!r}"
            )
        if isinstance(self.ratio, list):  # as JSON brings it
            object.__setattr__(self, "ratio", tuple(self.ratio))
        shares = self.ratio if isinstance(self.ratio, tuple) else () if self.ratio is None else (self.ratio,)
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ValueError(
                    f"ratio={self.ratio!r} is not allowed: each ratio must be a number in (0, 1]"
                )
        if self.ratio == ():
            raise ValueError("ratio=() is not allowed: give one share per tower layer, or a single number")
        if self.tokens is not None and (isinstance(self.tokens, bool) or not isinstance(self.tokens, int)):
            raise ValueError(f"tokens={self.tokens!r} is not allowed: it must be a whole number")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(
                f"tokens={self.tokens} is not allowed: at least 1 token must reach the language model"
            )
        for name, allowed in (("metric", METRICS), ("site", SITES), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; allowed are {', '.join(allowed)}"
                )
        for name in ("size_weighted", "proportional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be True or False")
        if not isinstance(self.early_depth, int | float) or not 0 <= self.early_depth <= 1:
            raise ValueError(
                f"early_depth={self.early_depth!r} is not allowed: it must be a number in [0, 1]"
            )
        if self.early_method is not None:
            check(self.early_method, {})
        if (self.early_method is None) != (self.early_depth == 0):
            raise ValueError(
                f"early_method={self.early_method!r} and early_depth={self.early_depth} go together: "
                "give both or none"
            )
        if not isinstance(self.parameters, dict):
            raise ValueError(f"parameters={self.parameters!r} is not allowed: it must be a dict")
        object.__setattr__(self, "parameters", dict(self.parameters))  # nobody else's to change
        check(self.method, self.parameters)
        if "depth" in self.parameters:
            raise ValueError("parameters may not hold 'depth': the layer sets it")
        if self.order == "method" and METHODS[self.method].ordered is None:
            raise ValueError(
                f"order='method' is not allowed: method {self.method!r} defines no order of its own"
            )

    @classmethod
    def recipe(cls, name: str, **changes: Any) -> "MergeConfig":
        """The config of a named recipe, with `ratio=` or `tokens=` and any other field changed.

        "paper": the equations. "released": what the authors' LLaVA branch computes instead.

        Raises:
            ValueError: an unknown recipe or field.
        """
        if name not in RECIPES:
            raise ValueError(f"recipe={name!r} is unknown; allowed are {', '.join(RECIPES)}")
        return cls.from_dict(RECIPES[name] | changes)

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

    def lengths(self, patches: int, layers: int) -> tuple[int, ...]:
        """Patches before the first and after each of the `layers` layers that may merge.

        Raises:
            ValueError: more tokens than patches, or not one ratio per layer.
        """
        if self.tokens is not None:
            return schedule.lengths_for(patches, layers, self.tokens)
        if isinstance(self.ratio, tuple) and len(self.ratio) != layers:
            raise ValueError(
                f"ratio holds {len(self.ratio)} shares; the tower has {layers} layers that can merge"
            )
        return schedule.lengths(
            patches, self.ratio if isinstance(self.ratio, tuple) else (self.ratio,) * layers
        )

    def tokens_at(self, patches: int, layers: int) -> int:
        """Image tokens that reach the language model, of `patches`."""
        return self.lengths(patches, layers)[-1]

    def method_at(self, depth: float) -> tuple[str, dict[str, Any]]:
        """The method and its parameters at a depth l_i / l in [0, 1)."""
        if self.early_method is not None and depth < self.early_depth:
            return self.early_method, {}
        return self.method, self.parameters


RECIPES: dict[str, dict[str, Any]] = {
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
}
