"""Where a tower's time goes, operation by operation, as torch's own profiler sees it."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llava_pitome.cli.bench.sides import Side, tower
from llava_pitome.cli.bench.targets import inputs

PASSES = 3
LEAST = 0.01  # share of the whole below which an operation is not told by name


def profiled(sides: list[Side], batch: int) -> str:
    """A Markdown table a side: milliseconds of one pass, share and calls of every operation that matters."""
    return "\n".join(_table(side, batch) for side in sides)


def _table(side: Side, batch: int) -> str:
    pixels = inputs(side.target, batch, side.tokens, 1)["pixel_values"]
    see = tower(side, pixels)
    cuda = pixels.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.inference_mode():
        see()
        see()
        with profile(activities=kinds) as found:
            for _ in range(PASSES):
                see()
    # on CUDA an operation and the kernel it starts are both told, with the same time
    events = [e for e in found.key_averages() if (e.device_type == DeviceType.CUDA) == cuda]
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in events}
    calls = {e.key: e.count for e in events}
    whole = sum(spent.values())
    named = sorted((name for name in spent if spent[name] >= LEAST * whole), key=spent.get, reverse=True)
    lines = [_line(name, spent[name], whole, calls[name]) for name in named]
    rest = [name for name in spent if name not in named]
    lines.append(_line("everything else", sum(map(spent.get, rest)), whole, sum(map(calls.get, rest))))
    head = f"{side.label}, batch {batch}: {whole / PASSES / 1000:.1f} ms in operations\n\n"
    return head + "| operation | ms | share | calls |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def _line(name: str, spent: float, whole: float, calls: int) -> str:
    return f"| {name} | {spent / PASSES / 1000:.1f} | {spent / whole:.1%} | {calls // PASSES} |"
