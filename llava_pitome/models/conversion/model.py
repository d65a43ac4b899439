"""The model of an original checkpoint: its weights under the names of LlavaForConditionalGeneration.

The renaming is not left to `from_pretrained(key_mapping=...)`, since the vision tower comes from another
checkpoint and the vocabulary grows. Files are memory-mapped: a tensor is copied only where its dtype or
device changes.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from llava_pitome.models.conversion.config import convert_config
from llava_pitome.models.conversion.processor import build_processor

ROW_MULTIPLE = 64  # to which the vocabulary is padded, as in the converted checkpoints of llava-hf
FILES = ("model.safetensors", "pytorch_model.bin")
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
TOWER = "model.vision_tower."
CLIP_MODULES = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # of a CLIP vision tower alone
NAMES = (  # patterns of the original's names, and what replaces them
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=(?:embed_tokens|layers|norm)\.)", "model.language_model."),
    (r"(?=lm_head\.)", ""),
)
BUFFERS = (
    "rotary_emb.inv_freq",
    "embeddings.position_ids",
)  # saved by older versions alone


def load(
    path: str, raw: dict[str, Any], hub: dict[str, Any], tower_hub: dict[str, Any], **options: Any
) -> tuple[nn.Module, Any]:
    """The model and processor of an original checkpoint.

    The vocabulary gains rows for <image> and <pad> and up to a multiple of ROW_MULTIPLE. They are the mean of
    the others, so that none of them can be the likeliest next token, and `generate` suppresses them.

    Args:
        path: its folder or hub id.
        raw: its config.json.
        hub: hub arguments for its files: revision, token, ...
        tower_hub: hub arguments for its vision tower's files.
        **options: as for `from_pretrained`, with a dtype.

    Raises:
        ValueError: a checkpoint that is not supported, or that lacks weights.
    """
    from transformers import LlavaForConditionalGeneration

    config = convert_config(raw, tower_hub)
    state = _model_weights(path, hub)
    rows = _vocabulary_rows(state)
    processor = build_processor(path, raw, config, hub, tower_hub)
    config.image_token_index = processor.image_token_id
    needed = max(rows, len(processor.tokenizer))
    config.text_config.vocab_size = rows if needed == rows else -(-needed // ROW_MULTIPLE) * ROW_MULTIPLE
    _pad_vocabulary(state, config.text_config.vocab_size)
    if not raw.get("unfreeze_mm_vision_tower"):  # as in the original, whose own copy counts only once trained
        state = {name: x for name, x in state.items() if not name.startswith(TOWER)}
        state |= _tower_weights(raw["mm_vision_tower"], tower_hub)
    if options["dtype"] == "auto":
        options["dtype"] = config.dtype or state[HEAD].dtype
    model, info = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        raise ValueError(f"{path} lacks weights: {', '.join(sorted(info['missing_keys'])[:5])}")
    model.name_or_path = model.config.name_or_path = path
    generation, text = model.generation_config, model.config.text_config
    generation.bos_token_id, generation.eos_token_id = text.bos_token_id, text.eos_token_id
    generation.pad_token_id = text.pad_token_id = processor.tokenizer.pad_token_id
    if text.vocab_size > rows:
        generation.suppress_tokens = list(range(rows, text.vocab_size))
    return model, processor


def _model_weights(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """All weights of an original checkpoint under their new names.

    Raises:
        ValueError: the path holds no weights, or some that no LLaVA-1.5 has.
    """
    state, unknown = {}, []
    for name, tensor in _read_weights(path, hub):
        renamed = next((re.sub(p, new, name, count=1) for p, new in NAMES if re.match(p, name)), None)
        if renamed is None:
            unknown.append(name)
        elif not renamed.endswith(BUFFERS):
            state[renamed] = tensor
    if unknown:
        raise ValueError(f"{path} holds weights that no LLaVA-1.5 has: {', '.join(sorted(unknown)[:5])}")
    return state


def _tower_weights(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The vision tower's weights under their new names, read from a CLIP vision tower or a complete CLIP."""
    state = {}
    for name, tensor in _read_weights(path, hub):
        bare = name.removeprefix("vision_model.")
        if (bare != name or name.startswith(CLIP_MODULES)) and not name.endswith(BUFFERS):
            state[TOWER + bare] = tensor
    return state


def _vocabulary_rows(state: dict[str, Tensor]) -> int:
    """The number of tokens in the vocabulary.

    Raises:
        ValueError: the embeddings or the head are missing, or their numbers of rows differ.
    """
    if missing := [name for name in (EMBEDDINGS, HEAD) if name not in state]:
        raise ValueError(f"the checkpoint lacks weights: {', '.join(missing)}")
    embeddings, head = len(state[EMBEDDINGS]), len(state[HEAD])
    if embeddings != head:
        raise ValueError(f"the checkpoint has {embeddings} embeddings, but {head} rows in its head")
    return head


def _pad_vocabulary(state: dict[str, Tensor], rows: int) -> None:
    """Pads embeddings and head to `rows` rows with the mean of their rows, in place."""
    for name in (EMBEDDINGS, HEAD):
        old = state[name]
        if (added := rows - len(old)) > 0:
            mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
            state[name] = torch.cat([old, mean.expand(added, -1)])


def _read_weights(path: str, hub: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The named weights of a folder or hub id, file by file.

    Raises:
        ValueError: there are none, or a file is damaged or holds anything but tensors.
    """
    for file in _weight_files(path, hub):
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            yield from load_file(file).items()
        else:  # weights_only unpickles nothing but tensors
            mapped = zipfile.is_zipfile(file)
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (UnpicklingError, EOFError, RuntimeError) as error:
                raise ValueError(f"{file} holds no weights, or more than weights: {error}") from error
            yield from state.items()


def _weight_files(path: str, hub: dict[str, Any]) -> list[str]:
    """The local paths of the weight files of a folder or hub id; ValueError where there are none."""
    from transformers.utils import cached_file

    for name in FILES:
        if file := cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub):
            return [file]
        index = cached_file(path, f"{name}.index.json", _raise_exceptions_for_missing_entries=False, **hub)
        if index is not None:
            with open(index) as opened:
                shards = sorted(set(json.load(opened)["weight_map"].values()))
            return [cached_file(path, shard, **hub) for shard in shards]
    raise ValueError(
        f"{path} holds no weights; allowed are {', '.join(FILES)}, or shards of one with an index"
    )
