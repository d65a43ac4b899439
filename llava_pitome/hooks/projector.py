"""The hook on the projector: merges once before the language model, and notes the features that reach it.

Shapes: I images, N tokens that the projector makes without prefix tokens, M after the merge, D channels.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import needs_attention
from llava_pitome.hooks.current_pass import encoded, keep, kept
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.hooks.image_features import ImageRecord, is_same, record_images
from llava_pitome.hooks.merge_step import MergePoint, MergeStep, TokenState
from llava_pitome.hooks.tower_state import EncodedImages, TowerPass
from llava_pitome.merge.plan import MergePlan
from llava_pitome.methods import METHODS

DEPTH = 1.0  # after all of the tower
RECORDS = 8  # calls whose images the language model recognises


class ProjectorPass:
    """What one forward pass through a projector merged.

    Attributes:
        tower: the pass through the tower that the features came from; None for features from elsewhere.
        tokens: that reached the language model.
        after: the last pass through the tower before it.
    """

    def __init__(self, tower: TowerPass | None, tokens: TokenState, after: TowerPass | None):
        """Keeps them."""
        self.tower, self.tokens, self.after = tower, tokens, after

    def plans(self) -> list[MergePlan]:
        """The merges from patches to these tokens, in order."""
        tower = [] if self.tower is None else self.tower.plans()
        return tower + [self.tokens.plan] * (self.tokens.merge is not None)


class ProjectorHooks(HookOwner):
    """The hook on a projector.

    Attributes:
        handle: the MergeHandle that it belongs to.
        step: what merges.
        newest: the last forward pass of any thread; None before there was one.
        newest_images: the records of the images that any thread encoded last.
    """

    def __init__(
        self,
        handle: Any,
        num_tower_layers: int,
        num_prefix_tokens: int,
        config: MergeConfig,
        triton: bool,
        records_images: bool,
    ):
        """Prepares the hook.

        Args:
            handle: the MergeHandle that it belongs to.
            num_tower_layers: up to the feature layer.
            num_prefix_tokens: prefix tokens among the features, 0 or 1.
            config: how to merge.
            triton: prefer kernels written in Triton.
            records_images: whether the language model needs to recognise the features.
        """
        self.handle, self.config = handle, config
        self.num_prefix_tokens, self.records_images = num_prefix_tokens, records_images
        self.step = MergeStep(config, num_prefix_tokens, triton)
        self._num_tower_layers = num_tower_layers
        self._point = MergePoint("prefix", 0, DEPTH, config.method, config.parameters)
        self.newest: ProjectorPass | None = None
        self.newest_images: tuple[ImageRecord, ...] | None = None

    def install(self, projector: nn.Module, handles: list[RemovableHandle]) -> None:
        """Registers the hook on a projector, from (I, prefix + N, channels) to (I, prefix + N, D)."""
        handles.append(projector.register_forward_hook(self._after_projector, with_kwargs=True))

    def forget(self) -> None:
        """Drops the last forward pass."""
        self.newest = self.newest_images = None

    @property
    def last(self) -> ProjectorPass | None:
        """This thread's last forward pass, or, where it ran none, the last one of any thread."""
        return kept("projector_pass", self.handle) or self.newest

    @property
    def tokens(self) -> TokenState | None:
        """The tokens that reached the language model in the last forward pass."""
        return None if self.last is None else self.last.tokens

    def images(self) -> list[ImageRecord]:
        """Records of the images that this thread encoded in its last calls, and any thread in the last."""
        own = kept("images", self.handle) or ()
        newest = self.newest_images
        is_known = newest is None or any(newest is call for call in own)  # tensors have no truth value
        return [record for call in (own if is_known else (*own, newest)) for record in call]

    def add_records(self, records: Sequence[ImageRecord]) -> None:
        """Keeps the records of one call's images, for the language model to recognise them."""
        before = () if is_compiling() else (kept("images", self.handle) or ())
        self.newest_images = tuple(records)
        keep("images", self.handle, (self.newest_images, *before[: RECORDS - 1]))

    def _after_projector(self, _module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Merges the projected features where the config says so."""
        features = args[0] if args else next(iter(kwargs.values()))
        known, same = self._recognised(features)
        output, tokens = self._merged(output, known, same)
        last = ProjectorPass(None if known is None else known.tower, tokens, kept("tower_pass", self.handle))
        if self.records_images and (known is not None or not self.config.merges_in_tower):
            count = features.shape[1] - self.num_prefix_tokens
            patches = count if known is None else known.tower.patches
            record = record_images(output, self.num_prefix_tokens, patches, tokens.patch_sizes, last.plans())
            self.add_records([record])
        self.newest = last
        keep("projector_pass", self.handle, last)
        return output

    def _recognised(self, features: Tensor) -> tuple[EncodedImages | None, Tensor | None]:
        """What is known of features (I, prefix + N, channels), and under torch.compile whether it holds."""
        patches = features[:, self.num_prefix_tokens :]
        for found in encoded(self.handle):
            if found.tower.tokens[-1].patch_sizes.shape != patches.shape[:2]:
                continue
            first, count = found.first_channel, found.probes.shape[2]
            same = is_same(found.probes, patches[..., first : first + count])
            if is_compiling():  # which cannot branch on values
                return found, same
            if bool(same):
                return found, None
        return None, None

    def _merged(
        self, output: Tensor, known: EncodedImages | None, same: Tensor | None
    ) -> tuple[Tensor, TokenState]:
        before = self._before(output, known, same)
        if not self.config.merges_in_prefix:
            return output, before
        count = output.shape[1] - self.num_prefix_tokens
        patches = count if known is None else known.tower.patches
        length = self.config.prefix_length(count, patches, self._num_tower_layers)
        if length == count:
            return output, before
        metric = self._keys(known) if uses_keys(self.config) else output
        inputs = {
            "class_attention": lambda: _encoded(known).class_attention,
            "grid": partial(grid, patches, self.config),
        }
        return self.step.merge(output, metric, length, before, self._point, inputs)

    def _before(self, output: Tensor, known: EncodedImages | None, same: Tensor | None) -> TokenState:
        """The tokens that the projector was given; of features from elsewhere nothing is known."""
        sizes = torch.ones(output.shape[:2], device=output.device)
        if known is not None:
            found = known.tower.tokens[-1].patch_sizes.to(output.device)
            if same is not None:
                found = torch.where(same, found, 1.0)
            sizes[:, self.num_prefix_tokens :] = found
        return TokenState(sizes, num_prefix_tokens=self.num_prefix_tokens)

    def _keys(self, known: EncodedImages | None) -> Tensor:
        """The keys (I, prefix + N, C) of the tower's last layer, of the tokens that left it."""
        keys = _encoded(known).keys
        patches = known.tower.tokens[-1].patch_sizes.shape[1]
        return keys[:, keys.shape[1] - patches - self.num_prefix_tokens :]


def _encoded(known: EncodedImages | None) -> EncodedImages:
    """What the tower computed of the features.

    Raises:
        RuntimeError: the features did not come from the tower.
    """
    if known is None:
        raise RuntimeError(
            "the projector was given features that the vision tower did not compute right before, so "
            "that their keys are unknown"
        )
    return known


def uses_keys(config: MergeConfig) -> bool:
    """Whether the merge after the projector measures similarity on the keys of the tower's last layer."""
    return (config.prefix_metric or METHODS[config.method].prefix_metric) == "keys"


def feature_keys(config: MergeConfig, has_tiles: bool = False) -> str | None:
    """What the merge after the projector needs of the feature layer's attention (VisionTowerHooks).

    Args:
        config: how to merge.
        has_tiles: whether the model cuts images into tiles, whose budget a merge after the projector meets.
    """
    if not config.merges_in_prefix and not has_tiles:
        return None
    if needs_attention(config.method) or config.tile_shares == "attention":
        return "attention"
    return "keys" if uses_keys(config) else None


def grid(patches: int, config: MergeConfig) -> tuple[int, int]:
    """Rows and columns of the patches that the tower was given.

    Raises:
        ValueError: they are not square, and nothing says what they are.
    """
    side = math.isqrt(patches)
    if config.resize is None and side * side != patches:
        raise ValueError(f"{patches} patches are no square grid, which method {config.method!r} needs")
    return config.resize or (side, side)
