"""Checks of what a merging LLaVA is called with, before anything is computed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks import kv_cache
from llava_pitome.hooks.block_merge import REPLACED
from llava_pitome.hooks.current_pass import keep, kept
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.methods import METHODS
from llava_pitome.models.hf_language_model import cache_in
from llava_pitome.models.hf_llava import feature_layers
from llava_pitome.models.parts import ModelParts

# METHOD_INPUTS that change with every token that is added to a prompt
OF_THE_PROMPT = {"received_attention", "last_attention", "text_attention", "text", "text_mask"}


class CallChecks(HookOwner):
    """The checks of a LLaVA's calls."""

    def __init__(self, handle: Any, parts: ModelParts, config: MergeConfig):
        """Keeps what was applied.

        Args:
            handle: the MergeHandle that they belong to.
            parts: of the model.
            config: how to merge.
        """
        self.handle, self.config = handle, config
        self._num_blocks, self._feature_layers = len(parts.blocks), parts.feature_layers
        self._strategy = "full" if parts.llava.reads_first_token else "default"
        self._feature_prefix, self._prefix = parts.num_feature_prefix_tokens, parts.num_prefix_tokens

    def install(self, parts: ModelParts, handles: list[RemovableHandle]) -> None:
        """Registers the hooks, and appends each to `handles`."""
        llava, on = parts.llava, handles.append
        on(llava.projector.register_forward_pre_hook(self._check_features))
        if llava.multimodal is not None:
            on(llava.multimodal.register_forward_pre_hook(self._check_selection, with_kwargs=True))
        if llava.llm is not None and not self.config.reaches_llm:
            on(llava.llm.register_forward_pre_hook(self._check_cache, with_kwargs=True))
        needs = set(METHODS[self.config.method].needs)
        if self.config.merging_layers and needs & OF_THE_PROMPT:
            on(parts.model.register_forward_pre_hook(self._check_generation, with_kwargs=True))

    def _check_selection(self, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """Before the multimodal module: raises ValueError for other features than those that merge."""
        for name in ("vision_feature_layer", "vision_feature_layers"):  # VipLlava's before transformers 5.23
            if (layer := kwargs.get(name)) is not None:
                check_feature_layer(layer, self._feature_layers, self._num_blocks)
        strategy = kwargs.get("vision_feature_select_strategy")
        if strategy not in (None, self._strategy):
            self._refuse_strategy(strategy)
        if kwargs.get("pixel_values") is not None and not is_compiling():
            keep("call", self.handle, (kept("tower_pass", self.handle),))

    def _check_features(self, _module: nn.Module, args: tuple) -> None:
        """Before the projector: raises an error for features that are not those of the tower and config."""
        last, call = kept("tower_pass", self.handle), kept("call", self.handle)
        keep("call", self.handle, None)
        if call is not None and call[0] is last:  # no pass through the tower since
            raise RuntimeError(REPLACED.format("the vision tower"))
        if last is None or not args or not isinstance(args[0], Tensor) or self._prefix == 0:
            return
        tiles = kept("tiles", self.handle)
        if tiles is not None and tiles.is_pooled:
            return
        count, patches = args[0].shape[1], last.tokens[-1].patch_sizes.shape[1]
        selected = count - patches
        if selected != self._feature_prefix and selected in (0, self._prefix):
            self._refuse_strategy("full" if selected else "default")

    def _refuse_strategy(self, strategy: Any) -> None:
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} contradicts {self._strategy!r}, with which merging "
            "was applied; set it in the model's config, and apply again"
        )

    def _check_cache(self, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """Before a language model in which nothing merges: raises RuntimeError for a cache with merges."""
        kv_cache.check_plain(cache_in(kwargs))

    def _check_generation(self, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        """Before the model: raises ValueError where every step of generation would merge anew.

        generate encodes images before its first step; before transformers had that, only its second step, a
        prompt that is one token longer, differs from a single forward pass.
        """
        ids, before = kwargs.get("input_ids"), kept("uncached", self.handle)
        keep("uncached", self.handle, None)
        is_uncached = kwargs.get("use_cache") is False and kwargs.get("logits_to_keep") == 1
        if ids is None or not is_uncached or torch.is_grad_enabled():
            return
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and kwargs.get("pixel_values") is None:
            return
        keep("uncached", self.handle, ids)
        if encoded is not None or (before is not None and _goes_on(before, ids)):
            raise ValueError(
                f"use_cache=False is not allowed where method {self.config.method!r} merges in the language "
                "model: it chooses tokens by the prompt, and would choose others for every new token; "
                "generate with a cache"
            )


def _goes_on(before: Tensor, ids: Tensor) -> bool:
    """Whether prompts (B, T) are some earlier ones (B, T - 1) and one more token."""
    return before.shape == ids[:, :-1].shape and torch.equal(before, ids[:, :-1])


def check_feature_layer(index: Any, layers: tuple[int, ...], num_blocks: int) -> None:
    """Raises ValueError for other feature layers than those that merging was applied with.

    Args:
        index: of hidden states, or several.
        layers: blocks before each of the model's own.
        num_blocks: of the tower.
    """
    if feature_layers(index, num_blocks) != layers:
        own = layers[0] if len(layers) == 1 else list(layers)
        raise ValueError(
            f"vision_feature_layer={index} contradicts {own} of {num_blocks}, with which merging was "
            "applied; set it in the model's config, and apply again"
        )
