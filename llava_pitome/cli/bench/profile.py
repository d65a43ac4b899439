"""Time of a vision tower by operation, from torch.profiler."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llava_pitome.cli.bench.report import markdown
from llava_pitome.cli.bench.targets import make_inputs
from llava_pitome.cli.bench.variants import Variant

PASSES, WARMUP = 3, 2
MIN_SHARE = 0.01  # operations that take less of the total share one line


def profile_table(variant: Variant, batch: int) -> str:
    """Returns a Markdown table of one pass: milliseconds, share of the total and calls of every operation."""
    pixels = make_inputs(variant.target, batch, variant.tokens, 1)["pixel_values"]
    cuda = pixels.device.type == "cuda"
    with torch.inference_mode():
        for _ in range(WARMUP):
            variant.encode(pixels)
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
            for _ in range(PASSES):
                variant.encode(pixels)
    # on CUDA an operation and its kernel are both listed, with the same time: the kernel's line counts
    events = [e for e in profiler.key_averages() if (e.device_type == DeviceType.CUDA) == cuda]
    times = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
    times.sort(reverse=True)
    total = sum(microseconds for microseconds, *_ in times)
    small = [entry for entry in times if entry[0] < MIN_SHARE * total]
    other = (sum(entry[0] for entry in small), sum(entry[1] for entry in small), "everything else")
    rows = [
        {
            "operation": name,
            "ms": f"{microseconds / PASSES / 1000:.1f}",
            "share": f"{microseconds / total:.1%}",
            "calls": str(calls // PASSES),
        }
        for microseconds, calls, name in [*times[: len(times) - len(small)], other]
    ]
    heading = f"{variant.label}, batch {batch}: {total / PASSES / 1000:.1f} ms in operations"
    return f"{heading}\n\n{markdown(rows)}"
