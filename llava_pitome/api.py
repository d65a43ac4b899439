"""apply, remove, merge_tokens and load: how a model starts and stops merging its visual tokens."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle, handle_of
from llava_pitome.hooks.hook_owner import remove_hooks
from llava_pitome.hooks.vision_tower import KERNELS
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.kernels import has_triton, supports_triton
from llava_pitome.models import adapters, checkpoints, config_checks, hf_language_model, hf_llava, processors
from llava_pitome.models.image_counts import counts_of
from llava_pitome.models.parts import ModelParts
from llava_pitome.saved_config import KEY

Kernels = bool | Literal["triton"]


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
    config_checks.check(parts, config)
    _check_kernels(parts, kernels)
    if processor is not None:
        _check_processor(parts, processor)
    llm = hf_language_model.find(parts, config)
    handle = MergeHandle(parts, config, kernels, llm)
    handle.processor = processor
    previous = _handle(parts)
    with ExitStack() as undo:
        if previous is not None:
            undo.callback(_install_again, model, previous, previous.model is parts.model)
            _uninstall(parts.model, previous)
        handle.config_before = getattr(parts.model.config, KEY, None)
        undo.callback(_uninstall, parts.model, handle)
        _install(parts, handle)
        undo.pop_all()
    return handle


def _handle(parts: ModelParts) -> MergeHandle | None:
    """The handle whose hooks are on a model, which may be a copy of the one it was applied to.

    Raises:
        ValueError: the vision tower merges as a part of another model.
    """
    handle = handle_of(parts.tower) or handle_of(parts.model)
    if handle is None or handle.model is parts.model:
        return handle
    is_part = handle.model is not None and any(x is parts.tower for x in handle.model.modules())
    if is_part or handle.num_inner_models != parts.num_inner_models:
        raise ValueError(
            f"the vision tower of this {type(parts.model).__name__} merges as that of a "
            f"{handle.model_class}: remove that first"
        )
    return handle


def _install(parts: ModelParts, handle: MergeHandle) -> None:
    """Installs the hooks, fits the processor, and notes the config in the model's."""
    model, config = parts.model, handle.config
    handle.install(parts, hf_language_model.find(parts, config))
    if handle.processor is not None:
        tiling, layers = None if parts.llava is None else parts.llava.tiling, parts.num_feature_layers
        if tiling is None:
            tokens_for = partial(config.tokens_at, layers=layers)
        else:
            tokens_for = partial(tokens_of_image, config, layers)
        processors.set_token_counts(handle.processor, tokens_for, handle, tiling)
    setattr(model.config, KEY, config.to_dict())
    adapters.add_tag(model, config)
    _reset_compiled(model)


def _uninstall(model: nn.Module, handle: MergeHandle, keeps_place: bool = False) -> None:
    """Undoes `_install`, also where that ended early, and on a copy of a model.

    Args:
        model: without wrappers.
        handle: whose hooks are on it.
        keeps_place: it will be installed again, and its processor is not to write for it meanwhile.
    """
    # a copy leaves the processor to the model that it is a copy of, while that is there
    owns_processor = handle.model is None or handle.model is model
    handle.remove(model, hf_llava.vision_tower(model))
    if handle.processor is not None and owns_processor:
        if keeps_place:
            processors.set_token_counts(handle.processor, None, handle)
        else:
            processors.restore(handle.processor, handle)
    adapters.remove_tag(model)
    if handle.config_before is None:
        vars(model.config).pop(KEY, None)
    else:
        setattr(model.config, KEY, handle.config_before)
    _reset_compiled(model)


def _install_again(model: nn.Module, handle: MergeHandle, was_on: bool) -> None:
    """Installs what `_uninstall` removed; a copy of a model gets a handle of its own.

    Args:
        model: with any wrappers.
        handle: that was removed.
        was_on: whether it had been installed on this very model.
    """
    parts = hf_llava.find(model)
    if was_on:
        _install(parts, handle)
        return
    llm = hf_language_model.find(parts, handle.config)
    copied = MergeHandle(parts, handle.config, handle.kernels, llm)
    copied.config_before = handle.config_before
    _install(parts, copied)


def remove(model: nn.Module) -> None:
    """Gives a model, its config and its processor back as they were before `apply`.

    Args:
        model: that merges, a copy of one, or a module that contains such models; where nothing merges,
            nothing is done.

    Raises:
        ValueError: the model is a part of one that merges.
    """
    done: set[int] = set()
    for module in list(model.modules()):
        tower = None if id(module) in done else hf_llava.vision_tower(module)
        if tower is None:
            continue
        handle = handle_of(tower) or handle_of(hf_llava.unwrap(module))
        if handle is None:
            continue
        parts = hf_llava.find(module)
        if handle.num_inner_models >= parts.num_inner_models:
            _uninstall(parts.model, _handle(parts))
            done.update(id(part) for part in module.modules())
    remove_hooks(model)  # those on copies of single parts


def applied(model: nn.Module) -> MergeConfig | None:
    """How a model, or the first one in a module around it, merges now; None where it does not."""
    for module in model.modules():
        tower = hf_llava.vision_tower(module)
        if tower is not None:
            handle = handle_of(tower) or handle_of(hf_llava.unwrap(module))
            return handle.config if handle is not None else None
    return None


def image_tokens(model: nn.Module, size: tuple[int, int] | None = None) -> int:
    """Image tokens in a model's prompts for the one image of a prompt, as it merges now.

    Args:
        model: merging or not.
        size: height and width of the image in pixels, which matter for models that cut images into tiles
            alone; None: the nominal size of their tiling.

    Raises:
        ValueError: the config has a budget that does not fit the image.
    """
    return counts_of(hf_llava.find(model)).images(applied(model), [size])[0]


def _check_processor(parts: ModelParts, processor: Any) -> None:
    """Raises ValueError for a processor that cannot write the model's placeholders."""
    if parts.llava is not None and parts.llava.image_token is None:
        raise ValueError(
            f"{type(parts.model).__name__} puts merged tokens where <image> stands, whatever their number; "
            f"leave processor={type(processor).__name__} out"
        )
    if parts.llava is not None and parts.llava.tiling is not None:
        processors.check_tiled(processor, parts.llava.tiling, parts.patch_size)
        return
    extra = parts.num_prefix_tokens
    if parts.llava is not None and not parts.llava.reads_first_token:
        extra -= 1
    processors.check(processor, parts.patch_size, extra)


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


@contextmanager
def merge_tokens(
    model: nn.Module, config: MergeConfig | None = None, processor: Any = None, *, kernels: Kernels = True
) -> Iterator[MergeHandle]:
    """`apply` for a with block; what was applied before is applied again after it, also when it raises."""
    parts = hf_llava.find(model)
    outer = _handle(parts)
    if config is None and outer is not None:
        config = outer.config
    with ExitStack() as undo:
        if outer is not None:
            undo.callback(_install_again, model, outer, outer.model is parts.model)
            _uninstall(parts.model, outer, keeps_place=True)
        inner = apply(model, config, processor, kernels=kernels)
        undo.callback(remove, model)
        yield inner


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
        path: a folder, a hub id, or "embedded" or "embedded-next" for the small models in this package; of a
            whole model, or of an adapter, whose base model is then loaded too.
        config: how to merge; None takes up what was saved with the checkpoint or adapter. A checkpoint
            without a saved config does not merge; an adapter without one is refused, since its weights are
            right under the config alone that it was trained with: `MergeConfig(ratio=1.0)` loads one that was
            trained without merging.
        quantization: "4bit" or "8bit" (bitsandbytes) for the language model, or None.
        kernels: as for `apply`.
        **options: as for `from_pretrained`: dtype, device_map, attn_implementation, ...

    Raises:
        ValueError: an unknown quantization, a checkpoint that is no LLaVA, an adapter that does not say how
            it merged, or a saved config that this package cannot read.
    """
    checkpoints.check_quantization(quantization)
    if config is None:
        config = checkpoints.saved_merge_config(path, **options)
    model, processor = checkpoints.load(path, quantization, **options)
    if config is not None:
        apply(model, config, processor, kernels=kernels)
    return model, processor


def save_merge_config(model: nn.Module, folder: str | Path) -> None:
    """Writes how a model merges now into a folder with its adapter or checkpoint, where `load` finds it.

    Adapters that peft saves say it by themselves, in a tag of their model card. This is for adapters saved
    otherwise, and for cards that another program writes anew. A model that does not merge is recorded as
    such, with `ratio=1.0`.

    Args:
        model: also in wrappers: a peft model, torch.compile, DistributedDataParallel.
        folder: where the model's adapter or checkpoint was saved, or will be.

    Raises:
        UnsupportedModelError: the model is not supported, or is in another wrapper.
    """
    found = hf_llava.find(model).model
    adapters.save_merge_config(found, applied(found) or MergeConfig(ratio=1.0), Path(folder))


def _reset_compiled(model: nn.Module) -> None:
    """Drops compiled graphs of a model, which contain its hooks; torch.compile does not check for new ones.

    torch can only drop all graphs of the process, so nothing is done where no part of the model is compiled.
    """
    # both names are private; a torch without the first does not say whether a module is compiled in place
    names = ("_compiled_call_impl", True), ("_orig_mod", None)
    if any(getattr(m, name, missing) is not None for m in model.modules() for name, missing in names):
        torch.compiler.reset()
