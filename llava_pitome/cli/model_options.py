"""The options that select a model, and loading the model that they select."""

import argparse
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from llava_pitome import api, embedded
from llava_pitome.cli.options import Option, boolean, one_of
from llava_pitome.config import MergeConfig
from llava_pitome.models import checkpoints
from llava_pitome.models.checkpoints import DTYPES

MODEL_OPTIONS = {
    "model": Option(
        embedded.NAME,
        str,
        "embedded | a folder | a hub id",
        "a LLaVA checkpoint, or an adapter of one",
        "model",
    ),
    "device": Option(None, str, "cpu, cuda, cuda:1, ...", "device; cuda where there is one", "model"),
    "dtype": Option(
        "auto", one_of(*DTYPES), " | ".join(DTYPES), "dtype of the weights; auto: as saved", "model"
    ),
    "load_4bit": Option(
        False, boolean, "true | false", "load the language model in 4 bits (needs bitsandbytes)", "model"
    ),
}


def check_model(options: argparse.Namespace) -> None:
    """Raises ValueError for a device or package that is missing, or a dtype that is too slow."""
    count = torch.cuda.device_count()
    devices = ["cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))]
    if options.device not in (None, *devices):
        raise ValueError(f"--device {options.device} is not available; allowed are {', '.join(devices)}")
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
    """The selected model and its processor, merging as `config` says; see `api.load`."""
    check_model(options)
    checkpoints.read_config(options.model)  # a clear error for a path without a model
    settings: dict[str, Any] = {"dtype": options.dtype, "quantization": "4bit" if options.load_4bit else None}
    if options.device or not options.load_4bit:  # otherwise bitsandbytes chooses
        settings["device_map"] = str(_device(options))
    return api.load(options.model, config, **settings)


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
