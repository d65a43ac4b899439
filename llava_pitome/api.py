"""The verbs: apply, remove, both as a context; and load, which takes a saved config up."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle, installed
from llava_pitome.hooks.vision_tower import KERNELS
from llava_pitome.kernels import has_triton, supports_triton
from llava_pitome.models import checkpoints
from llava_pitome.models import hf_language_model as language
from llava_pitome.models import hf_llava as llava
from llava_pitome.models import processors as placeholders

FIELD = "token_merging"  # of the model's config


class _Applied(NamedTuple):
    """What `remove` needs: the hooks, the fitted processor, and what the model's config held before."""

    merging: MergeHandle
    processor: Any
    before: dict[str, Any] | None


_applied: WeakKeyDictionary[nn.Module, _Applied] = WeakKeyDictionary()


def apply(
    model: nn.Module, config: MergeConfig, processor: Any = None, *, kernels: bool | str = True
) -> MergeHandle:
    """Makes a model merge its visual tokens, from the next forward pass until `remove`.

    The model is touched through hooks only. A config that was applied before is replaced, unless this raises.
    Wrap with peft first: a tower's key projection that is replaced later is merged on without what was added.
    Hooks of one's own on a tower's projections see one token where a kernel computes the attention.

    Args:
        model: see `llava.SUPPORTED`.
        config: how to merge; saved as `model.config.token_merging`.
        processor: the model's processor, which then writes as many <image> placeholders as tokens arrive.
            Without it the caller has to. The original package's models need none, and none is allowed.
        kernels: True lets this package's kernels compute what they are known to be faster at
            (docs/performance.md); False leaves everything to the model's own attention and plain PyTorch;
            "triton" adds the kernels for CUDA, which need triton and a model on a GPU; methods and orders
            that have none are left to PyTorch. Not saved with the model: they change roundings alone.

    Returns:
        The hooks; `plans()` tells after a forward pass which patches became which token.

    Raises:
        ValueError: the model is not supported, or cannot do what the config or `kernels` asks.
    """
    parts = llava.find(model)
    llava.check(parts, config)
    _check_kernels(parts, kernels)
    if processor is not None:
        if parts.whole is not None and parts.whole.image_token is None:
            raise ValueError(
                f"{type(parts.model).__name__} puts merged tokens where <image> stands by itself, whatever "
                f"their number; leave processor={type(processor).__name__} out"
            )
        placeholders.check(processor, parts.patch_size)
    merging = MergeHandle(parts, config, kernels, language.find(parts, config))
    remove(model)  # from here on nothing can fail
    if processor is not None:
        placeholders.fit(processor, partial(config.tokens_at, layers=parts.feature))
    _applied[parts.model] = _Applied(merging, processor, getattr(parts.model.config, FIELD, None))
    setattr(parts.model.config, FIELD, config.to_dict())
    merging.install()
    _forget_compiled()
    return merging


def remove(model: nn.Module) -> None:
    """Gives a model, its config and its processor back as they were before `apply`."""
    model = llava.unwrap(model)
    applied = _applied.pop(model, None)
    if applied is None:
        _remove_copied(model)
        return
    applied.merging.remove()
    if applied.processor is not None:
        placeholders.unfit(applied.processor)
    if applied.before is None:
        vars(model.config).pop(FIELD, None)
    else:
        setattr(model.config, FIELD, applied.before)
    _forget_compiled()


def applied(model: nn.Module) -> MergeConfig | None:
    """How a model merges now; None where it does not."""
    found = _applied.get(llava.unwrap(model))
    return found.merging.config if found is not None else None


def image_tokens(model: nn.Module) -> int:
    """Tokens that a picture of the tower's size has in a model's prompts, as it merges now, patches alone."""
    parts, config = llava.find(model), applied(model)
    return parts.patches if config is None else config.tokens_at(parts.patches, parts.feature)


def _check_kernels(parts: llava.ModelParts, kernels: bool | str) -> None:
    """Raises ValueError for kernels that are unknown, or that cannot run here."""
    if not isinstance(kernels, bool) and kernels != "triton":
        raise ValueError(f"kernels={kernels!r} is unknown; allowed are {', '.join(map(repr, KERNELS))}")
    if kernels == "triton" and not has_triton():
        raise ValueError("kernels='triton' needs triton, which is not installed: pip install triton")
    if kernels == "triton" and not supports_triton(next(parts.tower.parameters()).detach()):
        raise ValueError(
            "kernels='triton' needs a vision tower on a GPU, not in float64: move the model first"
        )


def _remove_copied(model: nn.Module) -> None:
    """Takes the hooks off a model that was copied while it merged."""
    places = installed(model)
    for place in places:
        place.remove()
    if places:
        vars(model.config).pop(FIELD, None)
        _forget_compiled()


@contextmanager
def merge_tokens(
    model: nn.Module, config: MergeConfig, processor: Any = None, *, kernels: bool | str = True
) -> Iterator[MergeHandle]:
    """`apply` for a with block; what was applied before comes back, also when it raises."""
    outer = _applied.get(llava.unwrap(model))
    merging = apply(model, config, processor, kernels=kernels)
    try:
        yield merging
    finally:
        remove(model)
        if outer is not None:
            apply(model, outer.merging.config, outer.processor, kernels=outer.merging.kernels)


def load(
    path: str,
    config: MergeConfig | None = None,
    *,
    quantization: str | None = None,
    kernels: bool | str = True,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A LLaVA and its processor, merging as `config` says, or else as the checkpoint was saved.

    Args:
        path: a folder, a hub id, or "embedded" for the small model inside this package; of a whole model, or
            of an adapter, whose model is then loaded too.
        config: how to merge; None takes up `token_merging` from the checkpoint, where it has one.
        quantization: "4bit" or "8bit" (bitsandbytes) for the language model, or None.
        kernels: as for `apply`.
        **options: as for `from_pretrained`: dtype, device_map, attn_implementation, ...

    Raises:
        ValueError: an unknown quantization, a checkpoint that is no LLaVA, or one saved with a config this
            package cannot read.
    """
    model, processor = checkpoints.load(path, quantization, **options)
    saved = getattr(model.config, FIELD, None)
    if saved is not None:
        vars(model.config).pop(FIELD)  # `remove` is to leave a plain model
    if config is None and saved is not None:
        config = MergeConfig.from_dict(saved)
    if config is not None:
        apply(model, config, processor, kernels=kernels)
    return model, processor


def _forget_compiled() -> None:
    """Compiled graphs have the hooks of their time built in, and torch does not look whether they changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
