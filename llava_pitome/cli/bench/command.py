"""The options of `llava-pitome bench` and its results: a table, bench.json, bench.md and plots."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from llava_pitome.cli.bench.environment import machine, packages
from llava_pitome.cli.bench.profile import profile_table
from llava_pitome.cli.bench.report import full_table, plot, summarise
from llava_pitome.cli.bench.targets import NAMED_TARGETS, SIZE, Target, build
from llava_pitome.cli.bench.timing import Workload, measure
from llava_pitome.cli.bench.variants import Variant, compile_limit, make_variant
from llava_pitome.cli.options import (
    Option,
    add_flags,
    boolean,
    folder,
    one_of,
    several,
    share,
    sides,
    whole,
)
from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.kernels.cpu_attention import is_faster

COMPILE = ("off", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
DTYPES = ("bfloat16", "float32", "float16")
KERNELS = {"on": (True,), "off": (False,), "both": (True, False), "triton": ("triton",)}
LABELS = {True: ", own attention", False: "", "triton": ", triton"}
DEFAULTS = {"ratio": [0.975, 0.95, 0.925, 0.9, 0.85], "batch": [1, 4], "patches": [None], "rounds": 9,
            "warmup": 2, "text": 60, "new_tokens": [16, 128]}  # fmt: skip
QUICK = {"ratio": [0.9], "batch": [1], "rounds": 3, "warmup": 1, "new_tokens": [16]}


def _count(default: int | None, help: str, low: int = 1) -> Option:
    return Option(default, whole(low), f"a whole number from {low}", help)


def _counts(help: str) -> Option:
    return Option(None, _list(whole(1)), "whole numbers from 1, separated by commas", help)


def _list(read: Callable[[str], Any]) -> Callable[[str], list]:
    return lambda text: list(several(read)(text))


def _choice(default: str | None, names: Iterable[str], help: str = "") -> Option:
    allowed = " | ".join(names)
    return Option(default, one_of(*names), allowed, allowed + help)


def _flag(help: str) -> Option:
    return Option(False, boolean, "true | false", help)


OPTIONS = {  # those without a default get theirs from DEFAULTS or QUICK
    "target": Option(
        "tower", str, "a target", f"{' | '.join(NAMED_TARGETS)} | embedded | a folder or hub id of a LLaVA"
    ),
    "ratio": Option(
        None,
        _list(share),
        "numbers in (0, 1], separated by commas",
        "ratios of tokens kept (0.975,0.95,0.925,0.9,0.85)",
    ),
    "tokens": _counts("instead of ratios: image tokens at the input of the language model"),
    "batch": _counts("batch sizes (1,4)"),
    "patches": _counts("patches of an image, for named targets (576)"),
    "image_size": Option(
        None,
        sides,
        "height x width (672x672)",
        f"pixels of an image, for models that cut images into tiles ({SIZE[0]}x{SIZE[1]})",
    ),
    "shared_layers": _flag(
        "all layers of the language model share the weights of one: a 7B then takes 2 GB; for named targets"
    ),
    "recipe": _choice("paper", RECIPES),
    "kernels": _choice(None, KERNELS, ": this package's kernels (both, where they make a difference)"),
    "text": _count(None, "tokens of a prompt beside the image's (60)"),
    "new_tokens": _counts("lengths of answers in tokens (16,128)"),
    "rounds": _count(None, "number of times each variant is timed (9)"),
    "warmup": _count(None, "rounds before these, which are not timed (2)", 0),
    "dtype": _choice("bfloat16", DTYPES, ", of weights and images"),
    "device": _choice("cuda" if torch.cuda.is_available() else "cpu", ("cpu", "cuda")),
    "compile": _choice("off", COMPILE, ": mode of torch.compile for all vision towers"),
    "graphs": _flag("replay all vision towers as CUDA graphs; for target tower"),
    "threads": _count(torch.get_num_threads(), "threads of torch on CPUs"),
    "profile": _flag("also write profile.md, the towers' time by operation"),
    "quick": _flag("ratio 0.9, batch 1, 3 rounds, 1 warm-up and answers of 16, unless given"),
    "output": Option("output/bench", folder, "a folder, not a file", "folder for results", short="-o"),
}


def describe(commands: Any, name: str) -> None:
    """Adds the command and its options to a parser's subparsers."""
    parser = commands.add_parser(
        name,
        help="time a merging model against the dense one",
        description="Times vision towers and LLaVAs, dense and merging, in interleaved rounds.",
    )
    add_flags(parser, OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Measures what the options ask for, writes the results and prints the table.

    Raises:
        ValueError: options that exclude each other, or a target that cannot be built.
    """
    _check(options)
    fill_defaults(options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    profiles: list[str] = []
    graphs = len(options.ratio or options.tokens) * 2 * len(options.batch) * len(options.patches) + 8
    try:
        for patches in options.patches:
            target = build(
                options.target, getattr(torch, options.dtype), options.device, patches, options.image_size,
                options.shared_layers,
            )  # fmt: skip
            if target.layout is not None and options.compile != "off":
                raise ValueError(f"--compile is for targets whose images are one tile, not {options.target}")
            variants = _variants(target, options)
            for batch in options.batch:
                workload = Workload(batch, options.text, tuple(options.new_tokens), options.rounds,
                                    options.warmup, options.graphs)  # fmt: skip
                with compile_limit(graphs) if options.compile != "off" else nullcontext():
                    rows += measure(variants, workload)
                _write(rows, options, output)  # after every batch, so that an interrupted run keeps its rows
            if options.profile:
                profiles += [profile_table(v, batch) for batch in options.batch for v in variants]
                (output / "profile.md").write_text("\n".join(profiles))
    finally:
        torch.set_num_threads(threads)
    summary = summarise(rows)
    sys.stdout.write(full_table(summary))
    for path in (output / "bench.json", output / "bench.md", *plot(summary, output)):
        sys.stdout.write(f"{path}\n")
    return 0


def _variants(target: Target, options: argparse.Namespace) -> list[Variant]:
    """Returns the dense variant, and every amount with this package's kernels, without them, or both."""
    variants = [make_variant(target, None, "dense", False, options.compile)]
    amounts = {f"{ratio:g}": {"ratio": ratio} for ratio in options.ratio or ()}
    amounts |= {f"{tokens} tokens": {"tokens": tokens} for tokens in options.tokens or ()}
    for name, amount in amounts.items():
        config = MergeConfig.recipe(options.recipe, **amount)
        for kernels in KERNELS[options.kernels]:
            label = f"{name}{LABELS[kernels] if _own_attention(options) or kernels == 'triton' else ''}"
            variants.append(make_variant(target, config, label, kernels, options.compile))
    return variants


def _own_attention(options: argparse.Namespace) -> bool:
    """Whether this package's CPU attention kernel runs for CLIP-L's 577 tokens under these options."""
    queries = torch.empty(1, 16, 577, 64, dtype=getattr(torch, options.dtype), device="cpu")
    return options.device == "cpu" and options.compile == "off" and is_faster(queries)


def fill_defaults(options: argparse.Namespace) -> None:
    """Sets the options that were not given, in place."""
    defaults = DEFAULTS | {"kernels": "both" if _own_attention(options) else "on"}
    for name, value in (defaults | (QUICK if options.quick else {})).items():
        if name == "ratio" and options.tokens is not None:
            continue
        if getattr(options, name) is None:
            setattr(options, name, value)


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that exclude each other, before anything is built."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; allowed is cpu")
    if options.ratio is not None and options.tokens is not None:
        raise ValueError("--ratio and --tokens both say how far to merge: give one of them")
    if options.graphs and (options.device != "cuda" or options.target != "tower" or options.compile != "off"):
        raise ValueError("--graphs is for --target tower --device cuda, without --compile")
    if options.dtype == "float16" and options.device == "cpu":
        raise ValueError(
            "--dtype float16 is hundreds of times slower than bfloat16 on CPUs; allowed: bfloat16, float32"
        )
    if options.target == "tower" and (options.text or options.new_tokens):
        raise ValueError("--text and --new-tokens are for targets that generate; --target tower does not")
    if options.kernels == "both" and not _own_attention(options):
        raise ValueError("--kernels both: kernels make no difference here; allowed is on or off")
    if options.kernels == "triton" and (options.device != "cuda" or options.compile != "off"):
        raise ValueError("--kernels triton is for --device cuda, without --compile")


def _write(rows: list[dict[str, Any]], options: argparse.Namespace, output: Path) -> None:
    """Writes bench.json and bench.md."""
    summary = summarise(rows)
    results = {
        "options": {key: getattr(options, key) for key in OPTIONS if key != "output"},
        "machine": machine(options.device),
        "packages": packages(),
        "rows": summary,
    }
    (output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / "bench.md").write_text(full_table(summary))
