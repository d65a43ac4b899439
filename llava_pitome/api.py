"""apply, remove, merge_tokens and load: how a model starts and stops merging its visual tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle, installed
from llava_pitome.hooks.vision_tower import KERNELS
from llava_pitome.kernels import has_triton, supports_triton
from llava_pitome.models import checkpoints, hf_language_model, hf_llava, processors
from llava_pitome.models.parts import ModelParts
from llava_pitome.saved_config import KEY

Kernels = bool | Literal["triton"]


class _Applied(NamedTuple):
    """What `remove` needs: the handle, the fitted processor, and what the model's config held before."""

    handle: MergeHandle
    processor: Any
    before: dict[str, Any] | None


_applied: WeakKeyDictionary[nn.Module, _Applied] = WeakKeyDictionary()


def apply(
    model: nn.Module, config: MergeConfig | None = None, processor: Any = None, *, kernels: Kernels = True
) -> MergeHandle:
    """Makes a model merge its visual tokens, from the next forward pass until `remove`.

    The model changes by forward hooks, an attention function registered with transformers, and attributes
    of instances, all of which `remove` takes back. A config that was applied before is replaced; where this
    raises, the model and the processor are as they were.

    Args:
        model: a model of `models.hf_llava.SUPPORTED`.
        config: how to merge; saved as `model.config.token_merging`. None takes up what is there, as after
            `from_pretrained` of a model that was saved while it merged.
        processor: the model's processor, which then writes as many <image> placeholders as tokens reach the
            language model. Without it the caller has to. Models of the original package take none.
        kernels: True uses this package's kernels where they are known to be faster (docs/performance.md);
            False leaves everything to the model's own attention and plain PyTorch; "triton" adds the
            kernels for CUDA, which need triton and a model on a GPU. Kernels change roundings alone, and
            are not saved.

    Returns:
        The handle; `plans()` says after a forward pass which patches became which token.

    Raises:
        UnsupportedModelError: the model is not supported.
        ValueError: the model cannot do what the config or `kernels` asks, or no config is given or saved.
    """
    parts = hf_llava.find(model)
    if config is None:
        saved = getattr(parts.model.config, KEY, None)
        if saved is None:
            raise ValueError(f"give a config: the model was not saved with one (its config has no {KEY!r})")
        config = MergeConfig.from_dict(saved)
    hf_llava.check(parts, config)
    _check_kernels(parts, kernels)
    if processor is not None:
        _check_processor(parts, processor)
    handle = MergeHandle(parts, config, kernels, hf_language_model.find(parts, config))
    previous = _applied.get(parts.model)
    remove(model)
    with ExitStack() as undo:
        if previous is not None:
            undo.callback(_install, parts, previous)
        new = _Applied(handle, processor, getattr(parts.model.config, KEY, None))
        undo.callback(_uninstall, parts.model, new)
        _install(parts, new)
        undo.pop_all()
    return handle


def _install(parts: ModelParts, applied: _Applied) -> None:
    """Installs the hooks, changes the processor, and notes the config in the model's."""
    model, config, processor = parts.model, applied.handle.config, applied.processor
    applied.handle.install(parts)
    if processor is not None:
        processors.set_token_counts(processor, partial(config.tokens_at, layers=parts.num_feature_layers))
    setattr(model.config, KEY, config.to_dict())
    _applied[model] = applied
    _reset_compiled(model)


def _uninstall(model: nn.Module, applied: _Applied) -> None:
    """Undoes `_install`, also where that ended early."""
    applied.handle.remove()
    if applied.processor is not None:
        processors.restore(applied.processor)
    if applied.before is None:
        vars(model.config).pop(KEY, None)
    else:
        setattr(model.config, KEY, applied.before)
    _applied.pop(model, None)
    _reset_compiled(model)


def remove(model: nn.Module) -> None:
    """Gives a model, its config and its processor back as they were before `apply`."""
    model = hf_llava.unwrap(model)
    applied = _applied.get(model)
    if applied is None:
        _remove_from_copy(model)
    else:
        _uninstall(model, applied)


def applied(model: nn.Module) -> MergeConfig | None:
    """How a model merges now; None where it does not."""
    found = _applied.get(hf_llava.unwrap(model))
    return found.handle.config if found is not None else None


def image_tokens(model: nn.Module) -> int:
    """Image tokens in a model's prompts for an image of the tower's own size, as it merges now."""
    parts, config = hf_llava.find(model), applied(model)
    return parts.patches if config is None else config.tokens_at(parts.patches, parts.num_feature_layers)


def _check_processor(parts: ModelParts, processor: Any) -> None:
    """Raises ValueError for a processor that cannot write the model's placeholders."""
    if parts.llava is not None and parts.llava.image_token is None:
        raise ValueError(
            f"{type(parts.model).__name__} puts merged tokens where <image> stands, whatever their number; "
            f"leave processor={type(processor).__name__} out"
        )
    processors.check(processor, parts.patch_size)


def _check_kernels(parts: ModelParts, kernels: Kernels) -> None:
    """Raises ValueError for kernels that are unknown, or that cannot run here."""
    if not isinstance(kernels, bool) and kernels != "triton":
        raise ValueError(f"kernels={kernels!r} is unknown; allowed are {', '.join(map(repr, KERNELS))}")
    if kernels == "triton" and not has_triton():
        raise ValueError("kernels='triton' needs triton, which is not installed: pip install triton")
    if kernels == "triton" and not supports_triton(next(parts.tower.parameters()).detach()):
        raise ValueError(
            "kernels='triton' needs a vision tower on a GPU, not in float64: move the model first"
        )


def _remove_from_copy(model: nn.Module) -> None:
    """Takes the hooks off a model that was copied while it merged."""
    found = installed(model)
    for hooks in found:
        hooks.remove()
    if found:
        vars(model.config).pop(KEY, None)
        _reset_compiled(model)


@contextmanager
def merge_tokens(
    model: nn.Module, config: MergeConfig | None = None, processor: Any = None, *, kernels: Kernels = True
) -> Iterator[MergeHandle]:
    """`apply` for a with block; what was applied before is applied again after it, also when it raises."""
    outer = _applied.get(hf_llava.unwrap(model))
    handle = apply(model, config, processor, kernels=kernels)
    try:
        yield handle
    finally:
        remove(model)
        if outer is not None:
            apply(model, outer.handle.config, outer.processor, kernels=outer.handle.kernels)


def load(
    path: str,
    config: MergeConfig | None = None,
    *,
    quantization: Literal["4bit", "8bit"] | None = None,
    kernels: Kernels = True,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A LLaVA and its processor, merging as `config` says, or else as the checkpoint was saved.

    Args:
        path: a folder, a hub id, or "embedded" for the small model in this package; of a whole model, or of
            an adapter, whose base model is then loaded too.
        config: how to merge; None takes up `token_merging` from the checkpoint, where it has one.
        quantization: "4bit" or "8bit" (bitsandbytes) for the language model, or None.
        kernels: as for `apply`.
        **options: as for `from_pretrained`: dtype, device_map, attn_implementation, ...

    Raises:
        ValueError: an unknown quantization, a checkpoint that is no LLaVA, or one saved with a config this
            package cannot read.
    """
    model, processor = checkpoints.load(path, quantization, **options)
    saved = getattr(model.config, KEY, None)
    if saved is not None:
        vars(model.config).pop(KEY)  # `remove` is to leave a plain model
    if config is None and saved is not None:
        config = MergeConfig.from_dict(saved)
    if config is not None:
        apply(model, config, processor, kernels=kernels)
    return model, processor


def _reset_compiled(model: nn.Module) -> None:
    """Drops compiled graphs of a model, which contain its hooks; torch.compile does not check for new ones.

    torch can only drop all graphs of the process, so nothing is done where no part of the model is compiled.
    """
    # both names are private; a torch without the first does not say whether a module is compiled in place
    names = ("_compiled_call_impl", True), ("_orig_mod", None)
    if any(getattr(m, name, missing) is not None for m in model.modules() for name, missing in names):
        torch.compiler.reset()
