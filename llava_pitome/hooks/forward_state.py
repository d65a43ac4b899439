"""The state of one forward pass through a language model in which tokens merge.

Segment s is the layers after s merges. What is known of it is in entry s of a list, and is written again
with the same values where a layer runs again (gradient checkpointing).
Shapes: B prompts, T tokens, P tokens in the cache, I images over all prompts, n tokens an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_pitome.hooks import kv_cache, prompt_layout
from llava_pitome.hooks.block_merge import REPLACED
from llava_pitome.hooks.cache_identity import identify
from llava_pitome.hooks.kv_cache import CacheSettings, CacheState, SegmentCache
from llava_pitome.hooks.llm_attention_capture import LayerAttention
from llava_pitome.hooks.merge_step import ANOTHER_PASS, TokenState
from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.hf_language_model import takes_masks


class ForwardState:
    """The state of one forward pass through a language model.

    Attributes:
        owner: the hooks that made it.
        ran: the hooks that must run in every forward pass and have: indices of layers, and names of others.
        layouts: the prompts in each segment; None in a forward pass without images.
        tokens: the images' tokens there, of each group of images; None before the segment is reached.
        past: what the cache holds in each segment from earlier passes; None where nothing has ever merged.
        attention: what each layer that merges computed, while it is needed.
        projections: the query and key projections of the layer that runs.
        projected: queries (segment, 0) and keys (segment, 1) of these layers.
        pending: values that the hooks of a block pass to each other.
        segment: of the layer that runs.
        patches: of an image, in the vision tower, where all have equally many.
    """

    uses_kernel = False  # this package's attention kernel has no causal mask

    def __init__(
        self,
        owner: Any,
        segments: int,
        length: int,
        cache: CacheState | None,
        attention: str,
    ):
        """Starts a forward pass.

        Args:
            owner: the hooks that make it.
            segments: the number of merges plus one.
            length: T before the first layer.
            cache: the state kept with the cache by earlier passes.
            attention: the name of the language model's attention implementation.
        """
        self.owner = owner
        self._takes_masks = takes_masks(attention)
        self._is_causal_without_mask = attention != "eager"
        self.ran: set[int | str] = set()
        self.layouts: list[PromptLayout | None] = [None] * segments
        self.tokens: list[tuple[TokenState, ...] | None] = [None] * segments
        self.past = None if cache is None else cache.segments
        self.attention: list[LayerAttention | None] = [None] * segments
        self.projections: tuple[Any, Any] = (None, None)
        self.projected: dict[tuple[int, int], Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        self.segment = 0
        self._croppable = 0 if cache is None else cache.croppable + length
        self._previous_shift = self._shift = None if cache is None else cache.shift
        self._kept: Sequence[Tensor] | None = None
        self._patches: Sequence[Tensor] = ()
        self.patches = 0
        self._now: list[SegmentCache | None] = [None] * segments
        self._masks: list[Tensor | None] = [None] * segments
        self._positions: list[dict[str, Any] | None] = [None] * segments

    @property
    def has_images(self) -> bool:
        """Whether the prompts of this forward pass have images."""
        return self.layouts[0] is not None

    def start_with_images(
        self,
        layout: PromptLayout,
        sizes: Sequence[Tensor | None],
        before: SegmentCache,
        patches: Sequence[Tensor],
        weighted: bool,
    ) -> None:
        """Adds the images of the prompts.

        Args:
            layout: where they are.
            sizes: of each group of images, (I, n) patches that tokens stand for; None: one each.
            before: what is in the cache, where nothing has merged in it.
            patches: of each group, (I,) the patches of its images in the vision tower.
            weighted: add log sizes to the scores of their tokens.
        """
        self._croppable, self._patches = prompt_layout.tokens_after_images(layout), patches
        self.patches = int(patches[0][0])
        tokens = tuple(
            TokenState(
                (torch.ones(images.shape, device=images.device) if given is None else given).to(images.device)
            )
            for images, given in zip(layout.images, sizes)
        )
        if self.past is None:
            self.past = (before,) * len(self.layouts)
        has_sizes = any(given is not None for given in sizes)
        self.enter_segment(0, layout, tokens, weighted and has_sizes)

    def start_without_images(self, length: int, real: Tensor | None) -> None:
        """Adds `length` more tokens, padding where `real` (B, T) is False."""
        if self.past is not None:
            self._now = [past.extended(length, real, None) for past in self.past]

    def set_original_positions(self, kept: Sequence[Tensor]) -> None:
        """Gives the images' tokens the positions of their patches, raster index (I, n) in each group."""
        layout = self.layouts[0]
        self._kept = kept
        device = layout.images[0].device
        more = torch.zeros(layout.shape[0], dtype=torch.long, device=device)
        for g, (images, patches) in enumerate(zip(layout.images, self._patches)):
            more.index_add_(0, layout.row(g), patches.to(device) - images.shape[1])
        more = more.unsqueeze(1)
        self._shift = more if self._previous_shift is None else self._previous_shift + more

    def enter_segment(
        self, s: int, layout: PromptLayout, tokens: tuple[TokenState, ...], weighted: bool
    ) -> None:
        """Sets what segment s is given: the prompts as they are there, and their images' tokens."""
        self.layouts[s], self.tokens[s] = layout, tokens
        bias = _log_sizes(layout, tokens) if weighted else None
        self._now[s] = self.past[s].extended(layout.shape[1], layout.real, bias)
        self._masks[s] = self._positions[s] = None

    def position_ids(self, positions: Tensor) -> Tensor:
        """The position ids (B or 1, T) of this forward pass, from those that count the tokens."""
        if self._previous_shift is not None:
            positions = positions + self._previous_shift.to(positions.device)
        if self._kept is not None:
            positions = prompt_layout.original_positions(
                self.layouts[0], positions, self._kept, self._patches
            )
        return positions

    def mask(self, s: int, given: Tensor | None, like: Tensor) -> Tensor | None:
        """The attention mask in segment s, computed once.

        Args:
            s: the segment.
            given: the model's own mask, which fits segment 0.
            like: hidden states (B, T, D) there.
        """
        now = self._now[s]
        if not self._takes_masks:
            return self._padding_mask(s, given, like)
        if s == 0 and now.bias is None:
            return given
        if self._masks[s] is None:
            count, dtype, device = like.shape[1], like.dtype, like.device
            if s == 0:
                self._masks[s] = kv_cache.biased(given, now, count, dtype, device)
            else:
                self._masks[s] = kv_cache.mask(now, count, self._is_causal_without_mask, dtype, device)
        mask = self._masks[s]
        return None if mask is None else kv_cache.cast(mask, like)

    def _padding_mask(self, s: int, given: Tensor | None, like: Tensor) -> Tensor | None:
        """Flash attention's mask: (B, P + T), or None for a single query without padding."""
        now = self._now[s]
        if like.shape[1] == 1 and now.real is None:
            return given if s == 0 else None
        return kv_cache.padding_mask(now, len(like), like.device)

    def before_attention(self, layer: int, _query: Tensor, _key: Tensor) -> Tensor | None:
        """The log sizes (B, P + T) that weight a layer's attention, where no mask can hold them."""
        if self.past is None:
            return None
        return self._now[self.owner.segment(layer)].bias

    def positions(self, s: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments for segment s that give each token the position it has before the first layer."""
        layout = self.layouts[s]
        if layout is None or layout.origin is None:
            return {}
        cos, sin = kwargs["position_embeddings"]
        known = self._positions[s]
        if known is None or known["position_embeddings"][0].device != cos.device:
            origin = layout.origin.to(cos.device)
            both = tuple(
                gather_tokens(x.expand(len(origin), -1, -1).contiguous(), origin) for x in (cos, sin)
            )
            known = {"position_embeddings": both}
            if (ids := kwargs.get("position_ids")) is not None:
                known["position_ids"] = ids.expand(len(origin), -1).gather(1, origin.to(ids.device))
            self._positions[s] = known
        return known

    def check_shape(self, s: int, hidden: Tensor) -> None:
        """Raises RuntimeError where hidden states (B, T, D) are not those of this forward pass."""
        layout = self.layouts[s]
        if layout is None and self.has_images:
            raise RuntimeError(REPLACED.format("a layer of the language model"))
        if layout is not None and layout.shape != hidden.shape[:2]:
            raise RuntimeError(ANOTHER_PASS)

    def cache_state(self, settings: CacheSettings, cache: Any) -> CacheState:
        """The state to keep with the cache that this forward pass has filled."""
        segments = None if self.past is None else tuple(self._now)
        identity = identify(cache, settings.first_layers)
        return CacheState(settings, segments, self._croppable, self._shift, identity)


def _log_sizes(layout: PromptLayout, tokens: Sequence[TokenState]) -> Tensor:
    """Log sizes (B, T) of the images' tokens, 0 for text."""
    bias = torch.zeros(layout.shape, device=layout.images[0].device)
    for images, own in zip(layout.images, tokens):
        bias.view(-1)[images.flatten()] = own.sizes.log().flatten()
    return bias
