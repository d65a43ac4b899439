"""Seconds of the stages of a forward pass and of answers, with variants timed in interleaved rounds.

torch.utils.benchmark.Timer times one statement, with warm-up runs at every call: it cannot interleave
variants or time the stages inside a call. So this module has a clock of its own.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llava_pitome.cli.bench.memory import peak_bytes
from llava_pitome.cli.bench.targets import make_inputs
from llava_pitome.cli.bench.variants import Variant, cuda_graph
from llava_pitome.flops import counted
from llava_pitome.hooks.attention_capture import CapturedAttention
from llava_pitome.methods import METHODS
from llava_pitome.models import hf_llava as llava
from llava_pitome.models.hf_language_model import cache_in

log = logging.getLogger(__name__)


class Workload(NamedTuple):
    """What every variant runs.

    Attributes:
        batch: prompts at a time, each with one image.
        text: tokens of a prompt beside the image's.
        new_tokens: lengths of the answers that are timed, for targets that generate.
        rounds: number of times each variant is timed.
        warmup: rounds before these, which are not timed.
        graphs: replay vision towers as CUDA graphs; for targets that do not generate.
    """

    batch: int
    text: int = 60
    new_tokens: tuple[int, ...] = (16,)
    rounds: int = 9
    warmup: int = 2
    graphs: bool = False


def measure(variants: list[Variant], workload: Workload) -> list[dict[str, Any]]:
    """Returns a row for each variant: tokens, FLOPs, bytes, and under `seconds` the samples of every part.

    Every variant runs once a round, so that other load on the machine affects all of them; each round starts
    with another variant. Python's garbage collector is off while it runs.
    """
    batch, rounds, count = workload.batch, workload.rounds, len(variants)
    samples: list[dict[str, list[float]]] = [{} for _ in variants]
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            timers = [_timer(variant, workload) for variant in variants]
            for i in range(-workload.warmup, rounds):
                for k in ((i + j) % count for j in range(count)):
                    for part, seconds in timers[k]().items():
                        samples[k].setdefault(part, []).extend([seconds] * (i >= 0))
                log.info("batch %d: %s", batch, f"round {i + 1} of {rounds}" if i >= 0 else "warm-up")
    finally:
        gc.enable()
    with torch.no_grad():
        return [_row(variant, workload, seconds) for variant, seconds in zip(variants, samples)]


def _timer(variant: Variant, workload: Workload) -> Callable[[], dict[str, float]]:
    """Returns a function that runs a variant once and returns seconds by part."""
    inputs = make_inputs(variant.target, workload.batch, variant.tokens, workload.text)
    pixels, generates = inputs["pixel_values"], variant.target.generates
    calls: dict[str, Callable[[], Any]] = {}
    if variant.compiled or not generates:  # timing hooks on a compiled tower would be compiled with it
        calls["tower"] = partial(variant.encode, pixels)
    if (merges := replay_merges(variant, pixels)) is not None:
        calls["merging"] = merges
    if workload.graphs:
        calls = {part: cuda_graph(call) for part, call in calls.items()}

    def run() -> dict[str, float]:
        seconds = _time_answer(variant, inputs, workload.new_tokens) if generates else {}
        for part, call in calls.items():
            ((_, seconds[part]),) = time_stages(call, {}, pixels.device)["total"]
        return seconds

    return run


def replay_merges(variant: Variant, pixels: Tensor) -> Callable[[], None] | None:
    """Returns a function that repeats the merges of one pass through the vision tower, and nothing else.

    It takes the mean of the keys over heads, matches and reduces tokens, on the inputs of that pass. None for
    a dense or compiled tower, one that does not merge, and methods that need more than the metric, such as
    attention, whose cost would be missing.
    """
    if variant.handle is None or variant.compiled:
        return None
    config, step = variant.handle.config, variant.handle.tower.step
    if any(METHODS[method].needs for method in (config.method, config.early_method or config.method)):
        return None
    calls: list[Callable[[], Any]] = []
    merge, mean_keys = step.merge, CapturedAttention.mean_keys

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)

        return call

    with ExitStack() as undo:
        step.merge = recorded(merge)
        undo.callback(delattr, step, "merge")
        CapturedAttention.mean_keys = recorded(mean_keys)
        undo.callback(setattr, CapturedAttention, "mean_keys", mean_keys)
        variant.encode(pixels)

    def replay() -> None:
        for call in calls:
            call()

    return replay if calls else None


def _time_answer(
    variant: Variant, inputs: dict[str, Tensor], new_tokens: tuple[int, ...]
) -> dict[str, float]:
    """Returns seconds of the parts of one greedy answer; `prefill` is the time to the first token."""
    model, longest = variant.target.model, max(new_tokens)
    stages = llava.stages(model)
    if variant.compiled:
        stages.pop("tower")
    features = {}
    if variant.target.layout is not None:
        features["features"] = (llava.find(model).llava.multimodal, "get_image_features")
    lengths = {"max_new_tokens": longest, "min_new_tokens": longest}
    generate = partial(model.generate, **inputs, **lengths, do_sample=False)
    spans = time_stages(generate, stages | features | {"step": model}, inputs["pixel_values"].device)
    stops = [stop for _, stop in spans["step"]]  # one forward pass a token
    seconds = {name: stop - start for name in stages for start, stop in spans[name][:1]}
    if features:
        start, stop = spans["features"][0]
        seconds["packing"] = stop - start - seconds["tower"] - seconds["projector"]
    seconds["prefill"] = stops[0]
    if longest > 1:
        seconds["decode"] = (stops[-1] - stops[0]) / (longest - 1)
    return seconds | {f"answer of {count}": stops[count - 1] for count in new_tokens}


def _row(variant: Variant, workload: Workload, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Returns what a variant is, its FLOPs and bytes, and its seconds."""
    target, handle, batch = variant.target, variant.handle, workload.batch
    inputs = make_inputs(target, batch, variant.tokens, workload.text)
    pixels, model = inputs["pixel_values"], target.model
    flops = counted(model, make_inputs(target, 1, variant.tokens, workload.text))._asdict()
    row = {
        "side": variant.label,
        "batch": batch,
        "patches": target.patches,
        "tiles": 1 if target.layout is None else target.layout.tiles,
        "tokens": variant.tokens,
        "kernels": None if handle is None else handle.kernels,
        "merging": None if handle is None else handle.config.to_dict(),
        "flops": {part: n * batch for part, n in flops.items() if target.generates or part == "tower"},
        "seconds": seconds,
    }

    def prefill() -> None:
        cache = cache_in(model(**inputs, use_cache=True, logits_to_keep=1))
        row["kv_cache_bytes"] = sum(x.nbytes for x in llava.cached(cache))

    call = prefill if target.generates else partial(variant.encode, pixels)
    row["peak_bytes"] = peak_bytes(call, pixels.device)
    return row


def time_stages(
    work: Callable[[], Any], stages: dict[str, nn.Module | tuple[nn.Module, str]], device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Runs `work` once; returns start and stop, in seconds, of every stage's calls, and of all under "total".

    On CUDA the readings are events in the stream: nothing waits for the GPU before the end.

    Args:
        work: what is timed.
        stages: modules that it calls, by name; or a module and the name of a method of it.
        device: where they compute.
    """
    cuda = device.type == "cuda"
    now = _cuda_event if cuda else time.perf_counter
    starts: dict[str, Any] = {}
    calls: list[tuple[str, Any, Any]] = []

    def start(name: str, *_: Any) -> None:
        starts[name] = now()

    def stop(name: str, *_: Any) -> None:
        calls.append((name, starts.pop(name), now()))

    with ExitStack() as hooks:
        for name, stage in stages.items():
            if isinstance(stage, tuple):
                hooks.enter_context(_timed_method(*stage, partial(start, name), partial(stop, name)))
                continue
            hooks.enter_context(stage.register_forward_pre_hook(partial(start, name), prepend=True))
            hooks.enter_context(stage.register_forward_hook(partial(stop, name)))
        if cuda:
            torch.cuda.synchronize()
        begin = now()
        work()
        end = now()
    if cuda:
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, *readings in [("total", begin, end), *calls]:
        first, last = (begin.elapsed_time(x) / 1000 if cuda else x - begin for x in readings)
        spans.setdefault(name, []).append((first, last))
    return spans


@contextmanager
def _timed_method(
    module: nn.Module, name: str, start: Callable[[], None], stop: Callable[[], None]
) -> Iterator[None]:
    """Calls `start` and `stop` around every call of a module's method, until the context ends."""
    method, own = getattr(module, name), vars(module).get(name)

    @wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start()
        result = method(*args, **kwargs)
        stop()
        return result

    setattr(module, name, timed)
    try:
        yield
    finally:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)


def _cuda_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
