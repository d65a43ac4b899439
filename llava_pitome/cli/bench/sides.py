"""The models that are timed against each other: they share their weights, and each has its own hooks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome.api import apply
from llava_pitome.cli.bench.targets import Target, inputs
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.methods import METHODS
from llava_pitome.models import hf_llava as llava


class Side(NamedTuple):
    """One of the models.

    Attributes:
        label: what it is called in tables.
        target: the target with this side's model.
        merging: its hooks, None for the dense model.
        tokens: image tokens that reach its language model.
        compiled: whether torch.compile compiles its tower.
    """

    label: str
    target: Target
    merging: MergeHandle | None
    tokens: int
    compiled: bool = False


def side(target: Target, config: MergeConfig | None, label: str, kernels: bool | str, compiled: str) -> Side:
    """A side of its own: the target as it is (`config` None) or merging.

    Args:
        target: what is benchmarked.
        config: how to merge.
        label: what it is called.
        kernels: as for `api.apply`.
        compiled: torch.compile's mode for the tower, or "off".
    """
    weights = {id(t): t for t in (*target.model.parameters(), *target.model.buffers())}
    own = target._replace(model=copy.deepcopy(target.model, weights))
    merging = None if config is None else apply(own.model, config, kernels=kernels)
    feature = llava.find(own.model).feature
    tokens = target.patches if merging is None else config.tokens_at(target.patches, feature)
    made = Side(label, own, merging, tokens, compiled != "off")
    if made.compiled:
        with torch.no_grad():  # transformers installs hooks of its own at the first use, which break a graph
            tower(made, inputs(own, 1, tokens, 1)["pixel_values"])()
        llava.find(own.model).tower.compile(mode=compiled, dynamic=False)
    return made


def tower(side: Side, pixels: Tensor) -> Callable[[], Any]:
    """The tower's part of an answer, as LLaVA calls it."""
    module = llava.find(side.target.model).tower
    return lambda: module(pixels, output_hidden_states=True, return_dict=True)


@contextmanager
def compiling(count: int) -> Iterator[None]:
    """Lets torch.compile make `count` graphs of the same code, and fails where it would go on without."""
    settings = torch._dynamo.config
    with settings.patch(
        recompile_limit=max(count, settings.recompile_limit), fail_on_recompile_limit_hit=True
    ):
        yield


def graphed(work: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
    """The work as one CUDA graph: what is replayed reads and writes the same memory every time."""
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


def merges_alone(side: Side) -> bool:
    """Whether `overhead` can be told from the rest: the tower merges, by keys or hidden states alone."""
    config = side.merging.config
    methods = (config.method, config.early_method or config.method)
    return config.merges_in_tower and not any(METHODS[m].needs for m in methods)


def overhead(side: Side, pixels: Tensor) -> Callable[[], Any]:
    """The matching and merging of one forward pass and nothing else, on what the tower really had there."""
    merging = side.merging.tower
    blocks = merging.blocks[: merging.feature]
    keys: list[Tensor] = []
    hidden: list[Tensor] = []

    def see_keys(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        keys.append(output)

    def see_input(_module: nn.Module, args: tuple) -> None:
        hidden.append(args[0])

    def see_output(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        hidden.append(output)

    handles = [block.keys.register_forward_hook(see_keys, prepend=True) for block in blocks]
    for block in blocks:  # in front of the hooks that merge
        if merging.config.site == "attention":
            handles.append(block.norm.register_forward_pre_hook(see_input, prepend=True))
        else:
            handles.append(block.layer.register_forward_hook(see_output, prepend=True))
    tower(side, pixels)()
    for handle in handles:
        handle.remove()

    def work() -> None:
        for i in range(merging.feature):
            merging.merge_alone(i, keys[i], hidden[i])

    return work
