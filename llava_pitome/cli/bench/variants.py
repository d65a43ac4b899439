"""The models that are timed against each other: they share their weights, and each has hooks of its own."""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.api import apply
from llava_pitome.cli.bench.targets import Target, image_sizes, make_inputs
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models import hf_llava as llava

log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """A target, dense or merging.

    Attributes:
        label: its name in tables.
        target: the target with this variant's model.
        handle: what `apply` returned, None for the dense model.
        tokens: image tokens that reach the language model.
        compiled: whether torch.compile compiles its vision tower.
    """

    label: str
    target: Target
    handle: MergeHandle | None
    tokens: int
    compiled: bool = False

    def encode(self, pixels: Tensor) -> Any:
        """Returns the vision tower's output for pixels (B, 3, H, W), called as LLaVA calls it.

        Where images are cut into tiles: their packed features for pixels (B, tiles, 3, H, W).
        """
        if self.target.layout is not None:
            sizes = image_sizes(self.target, len(pixels))
            return self.target.model.get_image_features(pixel_values=pixels, image_sizes=sizes)
        tower = llava.find(self.target.model).tower
        return tower(pixels, output_hidden_states=True, return_dict=True)


def make_variant(
    target: Target,
    config: MergeConfig | None,
    label: str = "",
    kernels: bool | str = True,
    compile_mode: str = "off",
) -> Variant:
    """Returns a variant of a target, which stays as it is.

    Args:
        target: what is benchmarked.
        config: how to merge; None: the dense model.
        label: its name in tables.
        kernels: as for `api.apply`.
        compile_mode: torch.compile's mode for the vision tower, or "off".
    """
    weights = {id(t): t for t in (*target.model.parameters(), *target.model.buffers())}
    target = target._replace(model=copy.deepcopy(target.model, weights))
    handle = None if config is None else apply(target.model, config, kernels=kernels)
    parts = llava.find(target.model)
    tokens = _tokens(target, config, parts.num_feature_layers)
    variant = Variant(label, target, handle, tokens, compile_mode != "off")
    if variant.compiled:
        with torch.no_grad():  # transformers installs hooks at the first call, which would break a graph
            variant.encode(make_inputs(target, 1, tokens, 1)["pixel_values"])
        parts.tower.compile(mode=compile_mode, dynamic=False)
    return variant


def _tokens(target: Target, config: MergeConfig | None, layers: int) -> int:
    """Returns the tokens of an image at the input of the language model."""
    if target.layout is None:
        return target.patches if config is None else config.tokens_at(target.patches, layers)
    return target.layout.tokens if config is None else tokens_of_image(config, layers, target.layout)


@contextmanager
def compile_limit(graphs: int) -> Iterator[None]:
    """Lets torch.compile compile the same code `graphs` times, and raises where it would go on uncompiled.

    torch has no public setting for it. Where the private one is missing, this only logs a warning.
    """
    settings = getattr(getattr(torch, "_dynamo", None), "config", None)
    if not all(
        hasattr(settings, name) for name in ("patch", "recompile_limit", "fail_on_recompile_limit_hit")
    ):
        log.warning("this torch has no limit on recompiling that can be set: towers may be timed uncompiled")
        yield
        return
    limit = max(graphs, settings.recompile_limit)
    with settings.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        yield


def cuda_graph(work: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
    """Returns the replay of `work` as a CUDA graph: it reads and writes the same memory at every call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
