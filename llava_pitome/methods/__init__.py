"""Who joins whom: one file a method, and the dict that names them.

A method is a pure function on tensors that never sees a model. Most are `parents(metric, remove, *, depth,
**parameters) -> parent`; one that only drops tokens is `kept(metric, remove, ...)`, the survivors. To add
one, write its file and its line in METHODS; every test and every place then takes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.methods import (
    dct,
    diffrate,
    divprune,
    fastv,
    grid,
    pitome,
    prumerge,
    random,
    sparsevlm,
    tofu,
    tome,
    visionzip,
)

PLACES = ("tower", "prefix", "decoder")
METHOD_INPUTS = {  # what a place can tell a method beside the metric, by name, with an example for two by two patches
    "size": torch.ones(1, 4),  # (B, N) patches that a token stands for
    "class_attention": torch.full((1, 4), 0.25),  # (B, N) the class token's attention, mean over heads
    "received_attention": torch.full((1, 4), 0.25),  # (B, N) attention a token gets, mean over all queries
    "last_attention": torch.full((1, 4), 0.25),  # (B, N) the attention of the prompt's last token
    "text_attention": torch.full((1, 2, 4), 0.25),  # (B, Q, N) the attention of each text token
    "text": torch.eye(4)[None, :2],  # (B, Q, D) the text tokens, as `metric` has the image's
    "asks": torch.ones(1, 2, dtype=torch.bool),  # (B, Q) False where a text token is padding
    "grid": (2, 2),  # rows and columns of patches, where none has merged so far
}


class Method(NamedTuple):
    """A method's functions: `parents`, `kept`, `weighted` or `mixed`, and others that say more.

    All take (metric (B, N, D), remove, depth=..., **given, **parameters); `given` is what `needs` names.

    Attributes:
        parents: to parent (B, N).
        kept: to the positions (B, N - remove) of those who stay, ascending; the others leave nothing behind.
        ordered: to parent and the ranks (B, N) of the survivors, for methods whose authors do not keep raster
            order.
        weighted: to parent and how much of each token counts (B, N), where that is not all of it.
        mixed: to parent and what survivors are made of (B or 1, M, N), where that is no average.
        triton: as `parents`, on a GPU; its file is imported when it is called.
        energy: from (metric (B, N, D), depth=..., **parameters) to the energy (B, N) that it ranks tokens by;
            None where it goes by none.
        halves: pairs tokens up, so that at most half of them can go at once.
        keeps_norm: stretches averages to the longest of their tokens.
        needs: names in GIVEN.
        places: where the method's definition makes sense, its own paper's first.
        keys: at the prefix, similarity is measured on the tower's keys and not on the projected features.
    """

    parents: Callable[..., Tensor] | None = None
    kept: Callable[..., Tensor] | None = None
    ordered: Callable[..., tuple[Tensor, Tensor]] | None = None
    weighted: Callable[..., tuple[Tensor, Tensor]] | None = None
    mixed: Callable[..., tuple[Tensor, Tensor]] | None = None
    triton: Callable[..., Tensor] | None = None
    energy: Callable[..., Tensor] | None = None
    halves: bool = True
    keeps_norm: bool = False
    needs: tuple[str, ...] = ()
    places: tuple[str, ...] = PLACES
    keys: bool = False

    @property
    def find(self) -> Callable[..., Any]:
        """The function that says most."""
        return self.mixed or self.weighted or self.parents or self.kept

    @property
    def has_order(self) -> bool:
        """Whether its authors order survivors in a way of their own."""
        return self.ordered is not None

    @property
    def needs_grid(self) -> bool:
        """Whether it works on the grid of patches, as it is before any of them has merged."""
        return "grid" in self.needs


def _pitome_in_triton(
    metric: Tensor, remove: int, *, candidates: float | None = 2.0, split: str = "energy", **energy
) -> Tensor:
    """`pitome.parents` on a GPU, where it does what the paper says; the rest is left to PyTorch."""
    from llava_pitome.kernels import matching_triton

    if (candidates, split) != (2.0, "energy"):
        return pitome.parents(metric, remove, candidates=candidates, split=split, **energy)
    return matching_triton.parents(metric, remove, *pitome.resolved(**energy))


METHODS: dict[str, Method] = {
    "pitome": Method(pitome.parents, ordered=pitome.ordered, triton=_pitome_in_triton, energy=pitome.score),
    "tome": Method(tome.parents),
    "random": Method(random.parents),
    "tofu": Method(weighted=tofu.weighted, keeps_norm=True),
    "dct": Method(mixed=dct.mixed, halves=False),
    "diffrate": Method(
        weighted=diffrate.weighted, halves=False, needs=("class_attention",), places=("tower", "prefix")
    ),
    "grid": Method(grid.parents, halves=False, needs=("grid",), places=("prefix", "decoder")),
    "fastv": Method(kept=fastv.kept, halves=False, needs=("received_attention",), places=("decoder",)),
    "fastv-last": Method(
        kept=fastv.kept_by_last, halves=False, needs=("last_attention",), places=("decoder",)
    ),
    "visionzip": Method(
        visionzip.parents, halves=False, needs=("class_attention",), places=("prefix",), keys=True
    ),
    "prumerge": Method(
        mixed=prumerge.mixed, halves=False, needs=("class_attention",), places=("prefix",), keys=True
    ),
    "divprune": Method(kept=divprune.kept, halves=False, places=("prefix", "decoder")),
    "sparsevlm": Method(
        weighted=sparsevlm.weighted,
        halves=False,
        needs=("text", "text_attention", "asks"),
        places=("decoder",),
    ),
}
