"""The measurement: every side once a round, so that whatever else the machine does falls on all of them."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.cli.bench.clock import timed
from llava_pitome.cli.bench.memory import peak
from llava_pitome.cli.bench.sides import Side, graphed, merges_alone, overhead, tower
from llava_pitome.cli.bench.targets import inputs
from llava_pitome.flops import counted
from llava_pitome.models import hf_llava as llava

log = logging.getLogger(__name__)


class Load(NamedTuple):
    """What is asked of every side.

    Attributes:
        batch: prompts at a time, each with one image.
        text: tokens of a prompt besides the image's.
        new_tokens: lengths of the answers that are timed, for targets that answer.
        rounds: how often each side is timed.
        warmup: runs in front of that which do not count.
        graphs: replay towers as CUDA graphs; for targets that do not answer.
    """

    batch: int
    text: int = 60
    new_tokens: tuple[int, ...] = (16,)
    rounds: int = 9
    warmup: int = 2
    graphs: bool = False


def measure(sides: list[Side], load: Load) -> list[dict[str, Any]]:
    """One row a side: its tokens, FLOPs, bytes, and under `seconds` the samples of every part by round."""
    with _undisturbed():
        works = [_timing(side, load) for side in sides]
        samples: list[dict[str, list[float]]] = [{} for _ in sides]
        for turn in range(-load.warmup, load.rounds):
            for place in range(len(sides)):  # another side goes first in every round
                at = (place + turn) % len(sides)
                taken, work = samples[at], works[at]
                for name, seconds in work().items():
                    taken.setdefault(name, []).extend([seconds] * (turn >= 0))
            log.info(
                "batch %d: %s", load.batch, f"round {turn + 1} of {load.rounds}" if turn >= 0 else "warm-up"
            )
    with torch.no_grad():
        return [_row(side, load, taken) for side, taken in zip(sides, samples)]


def _timing(side: Side, load: Load) -> Callable[[], dict[str, float]]:
    """A function that runs a side once and gives seconds by part."""
    given = inputs(side.target, load.batch, side.tokens, load.text)
    pixels = given["pixel_values"]
    alone = side.compiled or not side.target.answers  # a hook on a compiled tower would be compiled with it
    works = {"tower": tower(side, pixels)} if alone else {}
    if side.merging is not None and not side.compiled and merges_alone(side):
        works["merging"] = overhead(side, pixels)
    if load.graphs:
        works = {name: graphed(work) for name, work in works.items()}

    def run() -> dict[str, float]:
        found = _answer(side, given, load.new_tokens) if side.target.answers else {}
        return found | {n: timed(work, {}, pixels.device)["all"][0].seconds for n, work in works.items()}

    return run


def _answer(side: Side, given: dict[str, Tensor], new_tokens: tuple[int, ...]) -> dict[str, float]:
    """Seconds of the parts of one greedy answer; time to first token is `prefill`."""
    model, longest = side.target.model, max(new_tokens)
    stages = {k: v for k, v in llava.stages(model).items() if not (side.compiled and k == "tower")}
    spans = timed(
        lambda: model.generate(**given, max_new_tokens=longest, min_new_tokens=longest, do_sample=False),
        stages | {"step": model},
        given["pixel_values"].device,
    )
    said = [step.stop for step in spans["step"]]  # when each token was there
    found = {name: spans[name][0].seconds for name in stages} | {"prefill": said[0]}
    if longest > 1:
        found["decode"] = (said[-1] - said[0]) / (longest - 1)
    return found | {f"answer of {count}": said[count - 1] for count in new_tokens}


def _row(side: Side, load: Load, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What there is to know of a side beside its seconds."""
    model = side.target.model
    given = inputs(side.target, load.batch, side.tokens, load.text)
    flops = counted(model, inputs(side.target, 1, side.tokens, load.text))
    row = {
        "side": side.label,
        "batch": load.batch,
        "patches": side.target.patches,
        "tokens": side.tokens,
        "kernels": None if side.merging is None else side.merging.kernels,
        "merging": None if side.merging is None else side.merging.config.to_dict(),
        "flops": {name: n * load.batch for name, n in flops._asdict().items()},
        "seconds": seconds,
    }
    if not side.target.answers:
        row["flops"] = {"tower": row["flops"]["tower"]}
        return row | {"peak_bytes": peak(tower(side, given["pixel_values"]), given["pixel_values"].device)}
    kept: list[int] = []

    def prefill() -> None:
        cache = model(**given, use_cache=True, logits_to_keep=1).past_key_values
        kept.append(sum(x.numel() * x.element_size() for x in llava.cached(cache)))

    row["peak_bytes"] = peak(prefill, given["pixel_values"].device)
    return row | {"kv_cache_bytes": kept[0]}


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without gradients, and without Python's garbage collector in the middle of a run."""
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        gc.enable()
