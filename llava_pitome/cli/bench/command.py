"""The bench's options, and what it writes: a table, bench.json, and pictures."""

import argparse
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llava_pitome.cli.bench.machine import machine, packages
from llava_pitome.cli.bench.plots import draw
from llava_pitome.cli.bench.profile import profiled
from llava_pitome.cli.bench.run import Load, measure
from llava_pitome.cli.bench.sides import Side, compiling, side
from llava_pitome.cli.bench.summary import summarise, table
from llava_pitome.cli.bench.targets import NAMED, Target, build
from llava_pitome.cli.options import share
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.kernels.cpu_attention import pays

COMPILE = ("off", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
DTYPES = ("bfloat16", "float32", "float16")
KERNELS = {"on": (True,), "off": (False,), "both": (True, False), "triton": ("triton",)}
LABELS = {True: ", own attention", False: "", "triton": ", triton"}
DEFAULTS = {"ratio": [0.975, 0.95, 0.925, 0.9, 0.85], "batch": [1, 4], "rounds": 9, "warmup": 2}
QUICK = {"ratio": [0.9], "batch": [1], "rounds": 3, "warmup": 1}
ANSWERS = {"text": 60, "new_tokens": [16, 128]}  # of targets that answer


def describe(commands: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = commands.add_parser(
        name,
        help="time a merging model against the dense one",
        description="Times towers and whole LLaVAs, dense and merging in turns, and tells where time goes.",
    )
    add, devices = parser.add_argument, ("cpu", "cuda")
    add("--target", default="tower", help=f"{', '.join(NAMED)}, embedded, or a folder or hub id with a LLaVA")
    add("--ratio", type=_shares, help="shares kept, with commas (0.975,0.95,0.925,0.9,0.85)")
    add("--batch", type=_counts, help="batch sizes, with commas (1,4)")
    add(
        "--patches",
        type=_counts,
        default=[None],
        help="patches of an image, with commas (576); named targets",
    )
    add("--recipe", choices=RECIPES, default="paper", help="how to merge (paper)")
    add(
        "--kernels",
        choices=KERNELS,
        help="this package's kernels for merging sides (both, where they differ)",
    )
    add("--text", type=_count, help="tokens of a prompt besides the image's (60)")
    add("--new-tokens", type=_counts, help="lengths of answers, with commas (16,128)")
    add("--rounds", type=_count, help="times that each side is timed (9)")
    add("--warmup", type=partial(_count, least=0), help="runs in front that do not count (2)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights and images (bfloat16)")
    add(
        "--device",
        choices=devices,
        default=devices[torch.cuda.is_available()],
        help="(cuda where there is one)",
    )
    add("--compile", choices=COMPILE, default="off", help="torch.compile for the towers of all sides (off)")
    add("--graphs", action="store_true", help="CUDA graphs for the towers of all sides; target tower")
    add("--threads", type=_count, default=torch.get_num_threads(), help="of torch on CPUs (all)")
    add("--profile", action="store_true", help="also write profile.md: the towers' time by operation")
    add("--quick", action="store_true", help="ratio 0.9, batch 1, 3 rounds, answers of 16, where not given")
    add("--output", type=Path, default=Path("output/bench"), help="folder for what is written (output/bench)")


def run(options: argparse.Namespace) -> int:
    """Measures what the options ask for, writes it down and shows the table.

    Raises:
        ValueError: options that do not go together, or a target that cannot be built.
    """
    _check(options)
    _complete(options)
    options.output.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    graphs = len(options.ratio) * 2 * len(options.batch) * len(options.patches) + 8
    try:
        for patches in options.patches:
            target = build(options.target, getattr(torch, options.dtype), options.device, patches)
            sides = _sides(target, options)
            for batch in options.batch:
                load = Load(batch, options.text, tuple(options.new_tokens), options.rounds, options.warmup,
                            options.graphs)  # fmt: skip
                with compiling(graphs) if options.compile != "off" else nullcontext():
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
            label = f"{ratio:g}{LABELS[kernels] if _own_attention(options) or kernels == 'triton' else ''}"
            sides.append(side(target, config, label, kernels, options.compile))
    return sides


def _own_attention(options: argparse.Namespace) -> bool:
    """Whether this package has an attention kernel of its own for what is asked for."""
    tokens = torch.empty(1, 577, 1024, dtype=getattr(torch, options.dtype), device="cpu")
    return options.device == "cpu" and options.compile == "off" and pays(tokens)


def _complete(options: argparse.Namespace) -> None:
    """Fills in what was not given."""
    known = (
        DEFAULTS | (QUICK if options.quick else {}) | {"kernels": "both" if _own_attention(options) else "on"}
    )
    known |= ANSWERS | ({"new_tokens": [16]} if options.quick else {})
    for name, value in known.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be done, before anything is built."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; allowed is cpu")
    if options.graphs and (options.device != "cuda" or options.target != "tower" or options.compile != "off"):
        raise ValueError("--graphs is for --target tower --device cuda, and not together with --compile")
    if options.dtype == "float16" and options.device == "cpu":
        raise ValueError(
            "--dtype float16 is hundreds of times slower than bfloat16 on CPUs; allowed: bfloat16, float32"
        )
    if options.target == "tower" and (options.text or options.new_tokens):
        raise ValueError("--text and --new-tokens are for targets that answer; --target tower does not")
    if options.kernels == "both" and not _own_attention(options):
        raise ValueError(
            "--kernels both: with and without kernels the same would run here; allowed is on or off"
        )
    if options.kernels == "triton" and (options.device != "cuda" or options.compile != "off"):
        raise ValueError("--kernels triton is for --device cuda, and not together with --compile")
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
