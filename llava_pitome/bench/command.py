"""The bench's options, and what it writes: a table, bench.json, and pictures."""

import argparse
import json
import os
import platform
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llava_pitome.bench.plots import draw
from llava_pitome.bench.profile import profiled
from llava_pitome.bench.run import Load, measure
from llava_pitome.bench.sides import Side, side
from llava_pitome.bench.summary import summarise, table
from llava_pitome.bench.targets import NAMED, Target, build
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.options import share

COMPILE = ("off", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
DTYPES = ("bfloat16", "float32", "float16")
PACKAGES = ("llava-pitome", "torch", "transformers")
KERNELS = {"on": (True,), "off": (False,), "both": (True, False), "triton": ("triton",)}
QUICK = {"ratio": [0.9], "batch": [1], "rounds": 3, "warmup": 1}


def describe(commands: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = commands.add_parser(
        name,
        help="time a merging model against the dense one",
        description="Times towers and whole LLaVAs, dense and merging in turns, and tells where time goes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--target", default="tower", help=f"{', '.join(NAMED)}, embedded, or a folder or hub id with a LLaVA")
    add("--ratio", type=_shares, default=[0.975, 0.95, 0.925, 0.9, 0.85], help="shares kept, with commas")
    add("--batch", type=_counts, default=[1, 4], help="batch sizes, with commas")
    add(
        "--patches", type=_counts, default=[None], help="patches of an image, with commas; named targets only"
    )
    add("--recipe", choices=RECIPES, default="paper", help="how to merge")
    add(
        "--kernels",
        choices=KERNELS,
        default="both",
        help="this package's kernels for the merged side",
    )
    add("--text", type=_count, default=60, help="tokens of a prompt besides the image's")
    add("--new-tokens", type=_counts, default=[1, 16], help="lengths of answers, with commas")
    add("--rounds", type=_count, default=9, help="times that each side is timed")
    add("--warmup", type=partial(_count, least=0), default=2, help="runs in front that do not count")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and images")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where",
    )
    add("--compile", choices=COMPILE, default="off", help="torch.compile for the towers of both sides")
    add("--graphs", action="store_true", help="CUDA graphs for the towers of both sides (target tower)")
    add("--threads", type=_count, default=torch.get_num_threads(), help="of torch, on CPUs")
    add("--profile", action="store_true", help="also write profile.md: the towers' time by operation")
    add("--quick", action="store_true", help="ratio 0.9, batch 1, 3 rounds")
    add(
        "--output",
        type=Path,
        default=Path("output/bench"),
        help="folder for bench.json, bench.md and pictures",
    )


def run(options: argparse.Namespace) -> int:
    """Measures what the options ask for, writes it down and shows the table.

    Raises:
        ValueError: options that do not go together, or a target that cannot be built.
    """
    if options.quick:
        vars(options).update(QUICK)
    _check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    try:
        for patches in options.patches:
            target = build(options.target, getattr(torch, options.dtype), options.device, patches)
            sides = _sides(target, options)
            for batch in options.batch:
                load = Load(batch, options.text, tuple(options.new_tokens), options.rounds, options.warmup,
                            options.graphs)  # fmt: skip
                rows += measure(sides, load)
                _write(rows, options)  # what is measured is kept, whatever happens next
            if options.profile:
                text = "\n".join(profiled(sides, batch) for batch in options.batch)
                (options.output / "profile.md").write_text(text)
    finally:
        torch.set_num_threads(before)
    done = summarise(rows)
    sys.stdout.write(table(done))
    for path in (options.output / "bench.json", options.output / "bench.md", *draw(done, options.output)):
        sys.stdout.write(f"{path}\n")
    return 0


def _sides(target: Target, options: argparse.Namespace) -> list[Side]:
    """The dense side, and every ratio with this package's kernels, without them, or both."""
    sides = [side(target, None, "dense", False, options.compile)]
    for ratio in options.ratio:
        config = MergeConfig.recipe(options.recipe, ratio=ratio)
        for kernels in KERNELS[options.kernels]:
            label = f"{ratio:g}" + {True: "", False: ", no kernels", "triton": ", triton"}[kernels]
            sides.append(side(target, config, label, kernels, options.compile))
    return sides


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be done, before anything is built."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; allowed is cpu")
    if options.graphs and (options.device != "cuda" or options.target != "tower" or options.compile != "off"):
        raise ValueError("--graphs is for --target tower --device cuda, and not together with --compile")
    if options.dtype == "float16" and options.device == "cpu":
        raise ValueError("--dtype float16 is hundreds of times slower than bfloat16 on CPUs; allowed is "
                         "bfloat16 or float32")  # fmt: skip
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file; it must be a folder")


def _write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes bench.json and bench.md."""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "command"}
    asked.pop("output")
    done = summarise(rows)
    whole = {"options": asked, "machine": machine(options.device), "packages": packages(), "rows": done}
    (options.output / "bench.json").write_text(json.dumps(whole, indent=1) + "\n")
    (options.output / "bench.md").write_text(table(done))


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def packages() -> dict[str, str | None]:
    """Versions of what computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {capability}"


def _count(text: str, least: int = 1) -> int:
    """Reads a whole number from `least`."""
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be a whole number from {least}")
    return int(text)


def _counts(text: str) -> list[int]:
    """Reads whole numbers from 1, separated by commas."""
    return [_count(word) for word in text.split(",")]


def _shares(text: str) -> list[float]:
    """Reads numbers in (0, 1], separated by commas."""
    try:
        return [share(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: it must be numbers in (0, 1], separated by commas"
        ) from error
