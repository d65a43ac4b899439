"""The hook on the projector: merges once before the language model, and notes the features that reach it.

Shapes: I images, N tokens that the projector makes without prefix tokens, M after the merge, D channels.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import CapturedAttention, needs_attention
from llava_pitome.hooks.image_features import ImageFeatures
from llava_pitome.hooks.merge_step import MergePoint, MergeStep, TokenState, encoded_pass, keep_encoded
from llava_pitome.hooks.vision_tower import VisionTowerHooks
from llava_pitome.merge.plan import MergePlan, gather_tokens
from llava_pitome.methods import METHODS

DEPTH = 1.0  # after all of the tower


class ProjectorHooks:
    """The hook on a projector.

    Attributes:
        tokens: the tokens that reached the language model in the last forward pass; None before there was
            one.
        features: a record of them for the language model; None where it needs none.
        step: what merges.
    """

    def __init__(
        self,
        projector: nn.Module,
        tower: VisionTowerHooks,
        num_prefix_tokens: int,
        config: MergeConfig,
        triton: bool,
        features: ImageFeatures | None,
    ):
        """Prepares the hook.

        Args:
            projector: (I, prefix + N, channels) to (I, prefix + N, D).
            tower: the hooks of the tower before it.
            num_prefix_tokens: prefix tokens among the features, 0 or 1.
            config: how to merge.
            triton: prefer kernels written in Triton.
            features: records which features reach the language model.
        """
        self.projector, self.tower, self.config = projector, tower, config
        self.num_prefix_tokens, self.features = num_prefix_tokens, features
        self.step = MergeStep(config, num_prefix_tokens, triton)
        self._point = MergePoint("prefix", 0, DEPTH, config.method, config.parameters)
        self._handles: list[RemovableHandle] = []
        self.tokens: TokenState | None = None

    def install(self) -> None:
        """Registers the hook."""
        self._handles.append(self.projector.register_forward_hook(self._after_projector))

    def remove(self) -> None:
        """Removes the hook, and drops the last forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tokens = None
        if self.features is not None:
            self.features.clear()

    def plans(self) -> list[MergePlan]:
        """The merge of the last forward pass."""
        return [self.tokens.plan] if self.tokens is not None and self.tokens.merge is not None else []

    def _after_projector(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """Merges the projected features where the config says so."""
        output, tokens = self._merged(output)
        encoded = encoded_pass(self.tower)
        if self.features is not None:
            plans = (encoded.plans() if encoded is not None else []) + [tokens.plan] * bool(tokens.merge)
            self.features.record(output, tokens.patch_sizes if plans else None, plans)
        if encoded is not None:
            encoded.captured.clear()
            keep_encoded(None)
        self.tokens = tokens
        return output

    def _merged(self, output: Tensor) -> tuple[Tensor, TokenState]:
        before = self._before(output)
        if not self.config.merges_in_prefix:
            return output, before
        count = output.shape[1] - self.num_prefix_tokens
        encoded = encoded_pass(self.tower)
        patches = count if encoded is None else encoded.patches
        length = self.config.prefix_length(count, patches, self.tower.num_layers)
        if length == count:
            return output, before
        metric = self._keys() if uses_keys(self.config) else output
        inputs = {
            "class_attention": self._class_attention,
            "grid": partial(grid, patches, self.config),
        }
        return self.step.merge(output, metric, length, before, self._point, inputs)

    def _before(self, output: Tensor) -> TokenState:
        """The tokens that the projector was given; of features from elsewhere nothing is known."""
        sizes = torch.ones(output.shape[:2], device=output.device)
        encoded = encoded_pass(self.tower)
        last = None if encoded is None else encoded.tokens[-1]
        if last is not None and last.patch_sizes.shape == sizes[:, self.num_prefix_tokens :].shape:
            sizes[:, self.num_prefix_tokens :] = last.patch_sizes
        return TokenState(sizes, num_prefix_tokens=self.num_prefix_tokens)

    def _captured(self) -> CapturedAttention:
        """What the tower's last layer captured.

        Raises:
            RuntimeError: the features did not come from the tower.
        """
        encoded = encoded_pass(self.tower)
        found = None if encoded is None else encoded.captured.get(self.tower.num_layers - 1)
        if found is None:
            raise RuntimeError(
                "the projector was given features that the vision tower did not compute right before, so "
                "that their keys are unknown"
            )
        return found

    def _keys(self) -> Tensor:
        """The keys (I, prefix + N, C) of the tower's last layer, of the tokens that left it."""
        keys, after = self._captured().mean_keys(), encoded_pass(self.tower).tokens[-1]
        if after.merge is not None:
            keys = _averaged(keys, after.merge)
        return keys[:, self.tower.num_prefix_tokens - self.num_prefix_tokens :]

    def _class_attention(self) -> Tensor:
        """The class token's attention (I, N) in the tower's last layer, to the tokens that left it."""
        state = encoded_pass(self.tower)
        sizes = state.attention_sizes(self.tower.num_layers - 1)
        found = self._captured().class_attention(self.tower.num_prefix_tokens, sizes)
        after = state.tokens[-1]
        if after.merge is None:
            return found
        return found.new_zeros(len(found), after.plan.length).scatter_add(1, after.plan.slot, found)


def uses_keys(config: MergeConfig) -> bool:
    """Whether the merge after the projector measures similarity on the keys of the tower's last layer."""
    return (config.prefix_metric or METHODS[config.method].prefix_metric) == "keys"


def feature_keys(config: MergeConfig) -> str | None:
    """What the merge after the projector needs of the feature layer's attention (VisionTowerHooks)."""
    if not config.merges_in_prefix:
        return None
    if needs_attention(config.method):
        return "attention"
    return "keys" if uses_keys(config) else None


def _averaged(x: Tensor, plan: MergePlan) -> Tensor:
    """The mean of the tokens of each slot."""
    kept = gather_tokens(x, plan.kept)
    total = torch.zeros_like(kept).scatter_add(1, plan.slot.unsqueeze(2).expand_as(x), x)
    counts = x.new_zeros(kept.shape[:2]).scatter_add(1, plan.slot, x.new_ones(plan.slot.shape))
    return total / counts.unsqueeze(2)


def grid(patches: int, config: MergeConfig) -> tuple[int, int]:
    """Rows and columns of the patches that the tower was given.

    Raises:
        ValueError: they are not square, and nothing says what they are.
    """
    side = math.isqrt(patches)
    if config.resize is None and side * side != patches:
        raise ValueError(f"{patches} patches are no square grid, which method {config.method!r} needs")
    return config.resize or (side, side)
