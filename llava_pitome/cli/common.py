"""What commands have in common: how a model, and how it is to merge, is said on the command line."""

import argparse
import difflib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llava_pitome import api, embedded
from llava_pitome.cli.options import fields, shares, whole
from llava_pitome.config import MergeConfig, asked
from llava_pitome.methods import METHODS
from llava_pitome.models import checkpoints
from llava_pitome.models.checkpoints import DTYPES
from llava_pitome.recipes import RECIPES


def describe_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --device, --dtype and --load-4bit."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default=embedded.NAME,
        help="embedded, or a folder or hub id of a LLaVA or adapter (embedded)",
    )
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (as they were saved)")
    add("--load-4bit", action="store_true", help="load the language model in 4 bits (needs bitsandbytes)")


def describe_merging(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds --ratio, --tokens, --recipe, --method and --merging; `several` allows methods with commas."""
    add = parser.add_argument_group("merging").add_argument
    add(
        "--ratio",
        type=reader(shares, "a number in (0, 1], or one per layer"),
        help="share each tower layer keeps",
    )
    add(
        "--tokens",
        type=reader(whole(1), "a whole number from 1"),
        help="image tokens at the LLM, instead of it",
    )
    add("--recipe", choices=RECIPES, default="paper", help="how to merge (paper)")
    read, kind = (methods, "with commas between them") if several else (method, "one of them")
    names = f"who joins whom: {', '.join(METHODS)}; {kind} (pitome)"
    elsewhere = 'one that does not merge in the tower needs --merging, such as \'{"decoder": {"1": 64}}\''
    add("--method", type=read, help=names if several else f"{names}; {elsewhere}")
    further = reader(fields, "a JSON object")
    add("--merging", type=further, metavar="JSON", help="further fields of MergeConfig: '{\"prefix\": 64}'")


def config(options: argparse.Namespace) -> MergeConfig | None:
    """How the options ask to merge; None where they do not ask for it.

    Raises:
        ValueError: they do not go together, or say how to merge but not how far.
    """
    named = {"ratio": options.ratio, "tokens": options.tokens, "method": options.method}
    return asked(options.recipe, named, options.merging)


def check_model(options: argparse.Namespace) -> None:
    """Raises ValueError for a device or a package that is not there, or a dtype that is too slow."""
    count = torch.cuda.device_count()
    there = ["cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))]
    if options.device not in (None, *there):
        raise ValueError(f"--device {options.device} is not there; allowed are {', '.join(there)}")
    if options.load_4bit and find_spec("bitsandbytes") is None:
        raise ValueError(
            "--load-4bit needs bitsandbytes, which is not installed: pip install 'llava-pitome[quantization]'"
        )
    if options.dtype == "float16" and _device(options).type == "cpu":
        raise ValueError(
            "--dtype float16 is hundreds of times slower than bfloat16 on CPUs; allowed: auto, bfloat16, "
            "float32"
        )


def load(options: argparse.Namespace, config: MergeConfig | None) -> tuple[nn.Module, Any]:
    """The model that the options name and its processor, merging as `config` says; see `api.load`."""
    check_model(options)
    checkpoints.configuration(options.model)  # a clear error for a path that leads nowhere
    quantization = "4bit" if options.load_4bit else None
    place = {"device_map": str(_device(options))}
    if options.load_4bit and options.device is None:
        place = {}  # bitsandbytes' own choice
    return api.load(options.model, config, quantization=quantization, dtype=options.dtype, **place)


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def reader(read: Callable[[str], Any], allowed: str) -> Callable[[str], Any]:
    """A reader of `options` as argparse takes it."""

    def read_word(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be {allowed}") from error

    return read_word


def method(text: str) -> str:
    """Reads the name of a method; of an unknown one the nearest is named."""
    if text not in METHODS:
        near = difflib.get_close_matches(text, METHODS, n=1, cutoff=0.0)[0]
        raise argparse.ArgumentTypeError(
            f"{text!r} is no method; the nearest is {near!r}, of {', '.join(METHODS)}"
        )
    return text


def methods(text: str) -> list[str]:
    """Reads names of methods, with commas between them, each once."""
    found = [method(name.strip()) for name in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a method twice")
    return found
