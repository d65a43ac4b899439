"""The weights of an original checkpoint under the names that the Hugging Face class has for them.

Files are mapped into memory, not read: a tensor takes memory of its own where it changes dtype or device.
"""

import json
import re
import zipfile
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

WHOLE = ("model.safetensors", "pytorch_model.bin")
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"
TOWER = "model.vision_tower."
BARE = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")  # a tower's, saved by transformers 5
NAMES = (  # in the original, and here
    (r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"model\.(?=(?:embed_tokens|layers|norm)\.)", "model.language_model."),
    (r"(?=lm_head\.)", ""),
)
DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # from sizes; saved by older versions


def model(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """All weights of an original checkpoint, by their new names.

    Raises:
        ValueError: the path holds no weights, or some that no LLaVA-1.5 has.
    """
    found, strange = {}, []
    for name, tensor in _read(path, hub):
        new = _renamed(name)
        if new is None:
            strange.append(name)
        elif not new.endswith(DERIVED):
            found[new] = tensor
    if strange:
        raise ValueError(f"{path} holds weights that no LLaVA-1.5 has: {', '.join(sorted(strange)[:5])}")
    return found


def _renamed(name: str) -> str | None:
    """The new name of a weight; None for one that is not known."""
    for pattern, new in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, new, name, count=1)
    return None


def rows(state: dict[str, Tensor]) -> int:
    """Tokens of the vocabulary.

    Raises:
        ValueError: embeddings or head are missing, or differ.
    """
    if missing := [name for name in (EMBEDDINGS, HEAD) if name not in state]:
        raise ValueError(f"the checkpoint lacks weights: {', '.join(missing)}")
    counts = len(state[EMBEDDINGS]), len(state[HEAD])
    if counts[0] != counts[1]:
        raise ValueError(f"the checkpoint has {counts[0]} embeddings, but {counts[1]} rows in its head")
    return counts[0]


def grow(state: dict[str, Tensor], count: int) -> None:
    """Gives the vocabulary `count` rows; the new ones are the mean of the others, which stay as they are."""
    for name in (EMBEDDINGS, HEAD):
        old = state[name]
        if (more := count - len(old)) > 0:
            mean = old.mean(0, keepdim=True, dtype=torch.float32).to(old.dtype)
            state[name] = torch.cat([old, mean.expand(more, -1)])


def with_tower(state: dict[str, Tensor], tower: str | None, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The same with the weights of a tower, a CLIP by itself or the half of one; None: those that it has.

    The original package reads the tower from where it was, and its copy in the checkpoint only where it
    learned.
    """
    if tower is None:
        return state
    state = {name: tensor for name, tensor in state.items() if not name.startswith(TOWER)}
    for name, tensor in _read(tower, hub):
        bare = name.removeprefix("vision_model.")
        if (bare != name or name.startswith(BARE)) and not name.endswith(DERIVED):
            state[TOWER + bare] = tensor
    return state


def _read(path: str, hub: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder or hub id, file by file.

    Raises:
        ValueError: a file is damaged, or holds anything but tensors.
    """
    for file in _files(path, hub):
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            yield from load_file(file).items()
        else:  # nothing but tensors is unpickled
            mapped = zipfile.is_zipfile(file)
            try:
                held = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except (UnpicklingError, EOFError, RuntimeError) as error:
                raise ValueError(f"{file} holds no weights, or more than weights: {error}") from error
            yield from held.items()


def _files(path: str, hub: dict[str, Any]) -> list[str]:
    """The files with weights of a folder or hub id.

    Raises:
        ValueError: there are none.
    """
    from transformers.utils import cached_file

    for name in WHOLE:
        if file := cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub):
            return [file]
        index = cached_file(path, f"{name}.index.json", _raise_exceptions_for_missing_entries=False, **hub)
        if index is not None:
            with open(index) as opened:
                shards = sorted(set(json.load(opened)["weight_map"].values()))
            return [cached_file(path, shard, **hub) for shard in shards]
    raise ValueError(
        f"{path} holds no weights; allowed are {', '.join(WHOLE)}, or shards of one with an index"
    )
