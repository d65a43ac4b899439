"""The attention function of a merging model: captures keys and queries, and weights keys by token size.

It is registered with transformers' AttentionInterface under the name of the implementation it wraps with a
prefix, and chosen by a config while merging is applied (`switch_attention`, `restore_attention`). Without a
forward pass's state it is the wrapped implementation, bit for bit.

Proportional attention adds log s to the scores (the paper, section 3.2). Implementations that take masks
are given it as a mask. Flash attention takes none: there every query gets one more channel sqrt(C), and
every key log s, which adds the same to their product (see `add_size_channel`).
Shapes: B images, T tokens, H heads, C channels a head.
"""

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava_pitome.hooks import attention_maps
from llava_pitome.hooks.current_pass import enter_pass, state_of_attention
from llava_pitome.kernels import cpu_attention
from llava_pitome.merge.plan import log_size_bias
from llava_pitome.methods import METHODS
from llava_pitome.models.hf_language_model import attention_implementation, takes_masks
from llava_pitome.models.parts import WRAPPED, trained_copies

LAYER = "token_merging_layer"  # the attribute of an attention module that holds its layer's index
BEFORE = "token_merging_attention"  # the attribute of a model that holds what its config chose before
ALIGNMENT = 8  # flash attention takes head dimensions that are multiples of it


class CapturedAttention:
    """Queries and keys of one layer, without gradients, as long as a merge needs them."""

    def __init__(self, queries: Tensor | None, keys: Tensor):
        """Detaches them.

        Args:
            queries: (B, H, T, C), or None where no method needs them.
            keys: (B, H, T, C).
        """
        self._queries = None if queries is None else queries.detach()
        self._keys = keys.detach()

    def mean_keys(self) -> Tensor:
        """One key per token (B, T, C): the mean over the heads, in float32 at least."""
        keys = self._keys.transpose(1, 2)
        return keys.mean(2, dtype=torch.promote_types(keys.dtype, torch.float32))

    def class_attention(self, num_prefix_tokens: int, sizes: Tensor | None) -> Tensor:
        """The class token's attention to the patches (B, N); without one, the mean attention of all tokens.

        Args:
            num_prefix_tokens: tokens before the patches, of which the first is the class token.
            sizes: (B, T) by which attention was weighted; None: it was not.
        """
        mask = None if sizes is None else log_size_bias(sizes.to(self._keys.device), self._keys.dtype)
        if num_prefix_tokens:
            found = attention_maps.attention(self._queries[:, :, :1], self._keys, mask)
            return found[:, 0, num_prefix_tokens:]
        return attention_maps.received(self._queries, self._keys, mask, None)


def needs_attention(method: str) -> bool:
    """Whether a method needs attention maps."""
    return any(need.endswith("attention") for need in METHODS[method].needs)


def merging_attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    token_merging: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the implementation `base` computes, with keys weighted by the sizes of their tokens.

    Args:
        base: the name of the attention implementation that is wrapped.
        module: the attention module.
        query: (B, H, T, C).
        key: (B, H or fewer, P + T, C).
        value: as `key`.
        attention_mask: as `base` takes it.
        token_merging: the state of the forward pass; its `before_attention` captures, and returns the log
            sizes (B, P + T) of the keys' tokens, or None where attention is not weighted.
        **kwargs: scaling, dropout and others for `base`.
    """
    log_sizes, uses_kernel = None, False
    token_merging = state_of_attention(module) if token_merging is None else token_merging
    if token_merging is None:
        enter_pass(None)  # called outside of a forward pass: what this thread ran before is over
    elif getattr(module, LAYER, None) is not None:
        log_sizes = token_merging.before_attention(getattr(module, LAYER), query, key)
        uses_kernel = token_merging.uses_kernel and base == "sdpa" and attention_mask is None
    if uses_kernel and _kernel_is_faster(module, query, kwargs.get("scaling")):
        return cpu_attention.attention(query, key, value, log_sizes), None
    if log_sizes is not None and takes_masks(base):
        bias = log_sizes.to(query.device, query.dtype)[:, None, None]  # (B, 1, 1, T)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
        elif attention_mask is not None:
            bias = attention_mask + bias
        attention_mask = bias
    elif log_sizes is not None:
        return _with_size_channel(base, module, query, key, value, attention_mask, log_sizes, kwargs)
    return _call(base, module, query, key, value, attention_mask, kwargs)


def _kernel_is_faster(module: nn.Module, query: Tensor, scaling: float | None) -> bool:
    """Whether this package's kernel for CPUs may take the place of SDPA and is known to be faster."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not module.training  # dropout
        and scaling in (None, query.shape[-1] ** -0.5)
        and cpu_attention.is_faster(query)
    )


def add_size_channel(
    query: Tensor, key: Tensor, value: Tensor, log_sizes: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose plain attention, scaled by `scaling`, is proportional attention.

    Query channel C is 1 / scaling (the paper's sqrt(C)) and key channel C is log s, so that the scaled
    product is q k scaling + log s. Further channels are zeros, up to a multiple of ALIGNMENT; those of the
    values are to be cut off again.

    Args:
        query: (B, H, T, C).
        key: (B, H', S, C).
        value: (B, H', S, C).
        log_sizes: (B, S) of each key's token.
        scaling: of the product of queries and keys.
    """
    channels = query.shape[-1]
    more = -(-(channels + 1) // ALIGNMENT) * ALIGNMENT - channels
    query, key, value = (F.pad(x, (0, more)) for x in (query, key, value))
    root = torch.tensor(1 / scaling, dtype=query.dtype, device=query.device)
    query[..., channels] = root
    wide = log_sizes.to(query.device, torch.promote_types(query.dtype, torch.float32))
    exact = wide * (1 / scaling / root.to(wide))  # the root may have been rounded to half precision
    key[..., channels] = exact.to(key.dtype)[:, None]
    return query, key, value


def _with_size_channel(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    log_sizes: Tensor,
    kwargs: dict,
) -> tuple[Tensor, Tensor | None]:
    channels = value.shape[-1]
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    query, key, value = add_size_channel(query, key, value, log_sizes, scaling)
    output, weights = _call(base, module, query, key, value, mask, kwargs | {"scaling": scaling})
    return output[..., :channels], weights


def _call(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict
) -> tuple[Tensor, Tensor | None]:
    """Calls the wrapped implementation."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if base == "eager":  # each modeling file has its own
        eager = next(
            found
            for kind in type(module).__mro__
            if (found := getattr(sys.modules[kind.__module__], "eager_attention_forward", None)) is not None
        )
        return eager(module, query, key, value, mask, **kwargs)
    if "flash" in base:  # which reads its own name from the module's config
        module = _Named(module, base)
    return ALL_ATTENTION_FUNCTIONS[base](module, query, key, value, mask, **kwargs)


class _Named:
    """A module, or its config, whose attention implementation is called by its own name."""

    def __init__(self, wrapped: Any, base: str):
        self._wrapped, self._attn_implementation = wrapped, base

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        return _Named(found, self._attn_implementation) if name == "config" else found


_switched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models whose config chooses the function


def switch_attention(model: nn.Module) -> None:
    """Makes a vision tower or language model call the attention function of this file.

    It captures and weights in the modules that `number_layers` was given. A model that calls it already, but
    for which another implementation was set since, calls it around that one. Copies of its modules have
    configs of their own.
    """
    base = attention_implementation(model.config)
    register(base)
    before = [vars(other)[BEFORE] for other in list(_switched) if other.config is model.config]
    setattr(model, BEFORE, before[0] if before else model.config._attn_implementation)
    for config in _configs(model):
        config._attn_implementation = WRAPPED + attention_implementation(config)
        register(attention_implementation(config))
    _switched.add(model)


def number_layers(modules: Sequence[nn.Module]) -> None:
    """Tells attention modules, given in the order of their layers, which layer they are."""
    for layer, module in enumerate(modules):
        for part in trained_copies(module):
            setattr(part, LAYER, layer)


def is_switched(model: nn.Module) -> bool:
    """Whether a model's config chooses the attention function: nobody has set another one since."""
    return (model.config._attn_implementation or "").startswith(WRAPPED)


def restore_attention(root: nn.Module) -> None:
    """Gives the configs of a model and its parts their own implementations back.

    One that another model shares, which merges too, is left as it is.
    """
    unset: set[int] = set()
    for module in root.modules():
        vars(module).pop(LAYER, None)
        if BEFORE in vars(module):
            _switched.discard(module)
            if vars(module).pop(BEFORE) is None:
                unset.add(id(module.config))
    shared = {id(model.config) for model in list(_switched)}
    for config in _configs(root):
        if (config._attn_implementation or "").startswith(WRAPPED) and id(config) not in shared:
            base = attention_implementation(config)
            config._attn_implementation = None if id(config) in unset and base == "eager" else base


def _configs(root: nn.Module) -> list[Any]:
    """The different configs of a model's modules that choose an attention implementation."""
    found = (vars(module).get("config") for module in root.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation")}.values())


def register(base: str) -> None:
    """Registers `merging_attention` around an implementation, and its masks, with transformers."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = WRAPPED + base
    if name in ALL_ATTENTION_FUNCTIONS:
        return
    masks = ALL_MASK_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(name, _around(base))
    if base in masks:
        masks.register(name, masks[base])


def _around(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`merging_attention` around one implementation; a plain function, which torch.compile can trace."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple:
        return merging_attention(base, module, query, key, value, mask, **kwargs)

    return attention
