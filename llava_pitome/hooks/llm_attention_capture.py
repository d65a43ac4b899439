"""What a method may need of a language model layer that merges: keys, and attention to the image's tokens.

Computed from the layer's own queries, keys and mask for the rows that are needed, so that any attention
kernel serves. Hooks on the projections capture queries and keys before their positions are rotated in;
similarity is measured on these, attention on the rotated ones.
Shapes: B prompts, T tokens, P tokens in the cache, I images, n tokens an image, Q text tokens,
H heads, C channels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.hooks import attention_maps, kv_cache, prompt_layout
from llava_pitome.hooks.attention_capture import needs_attention
from llava_pitome.hooks.current_pass import current_pass
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.hooks.kv_cache import SegmentCache
from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.parts import BlockParts, LanguageModelAdapter


class ProjectionCapture(HookOwner):
    """The hooks on one layer's query and key projections."""

    def __init__(self, owner: Any, adapter: LanguageModelAdapter, segment: int, method: str, by_keys: bool):
        """Prepares the hooks.

        Args:
            owner: the hooks of the language model.
            adapter: of the language model.
            segment: the layers up to this one that see tokens of one length; its index.
            method: a name in METHODS.
            by_keys: whether similarity is measured on keys.
        """
        self._owner, self._adapter, self._segment = owner, adapter, segment
        self._attention = needs_attention(method)
        self._keys = by_keys or self._attention

    def install(self, block: BlockParts, handles: list[RemovableHandle]) -> None:
        """Registers the hooks that are needed on a layer, and appends each to `handles`."""
        queries, keys = self._adapter.projections(block.attention)
        if self._keys:
            handles.append(keys.register_forward_hook(partial(self._capture, 1)))
        if self._attention:
            handles.append(queries.register_forward_hook(partial(self._capture, 0)))

    def _capture(self, which: int, module: nn.Module, _args: tuple, output: Tensor) -> None:
        state = current_pass(self._owner)
        if state is None or not state.has_images or state.segment != self._segment:
            return
        if state.projections[which] is not module:
            raise RuntimeError(
                "a projection of a layer that is to merge was wrapped after apply: what was added would not "
                "count in what merges; wrap first, or apply again"
            )
        heads = output.detach().unflatten(-1, (self._adapter.num_heads[which], -1)).transpose(1, 2)
        state.projected[self._segment, which] = heads  # (B, H, T, C)


class LayerAttention(NamedTuple):
    """A layer in the middle of a forward pass.

    Attributes:
        queries: (B, H, T, C) without positions; None where no method needs attention.
        keys: (B, H', T, C) without positions; None where nothing needs them.
        layout: where the images are.
        mask: the attention mask the layer was given, (B or 1, 1, T, P + T), or None.
        rotation: cosine and sine (B or 1, T, C) of the positions.
        cached: from P to the keys in the cache (B, H', P, C), with positions.
        past: P.
        grid: rows and columns of patches.
        group: the group of images in the layout for which inputs are computed.
    """

    queries: Tensor | None
    keys: Tensor | None
    layout: PromptLayout
    mask: Tensor | None
    rotation: tuple[Tensor, Tensor]
    cached: Callable[[int], Tensor]
    past: int
    grid: Callable[[], tuple[int, int]]
    group: int = 0

    def mean_keys(self) -> Tensor:
        """One key per token (B, T, C), the mean over the heads, in float32 at least.

        Raises:
            RuntimeError: the key projection was replaced after `apply`.
        """
        keys = self._captured(self.keys).transpose(1, 2)
        return keys.mean(2, dtype=torch.promote_types(keys.dtype, torch.float32))

    def inputs(self, source: Tensor) -> dict[str, Callable[[], Any]]:
        """Functions for METHOD_INPUTS; `source` (B, T, D) is what the metric comes from."""
        return {
            "received_attention": self.received_attention,
            "last_attention": self.last_attention,
            "text_attention": self.text_attention,
            "text": partial(self.text, source),
            "text_mask": self.text_mask,
            "grid": self.grid,
        }

    def received_attention(self) -> Tensor:
        """Attention that each image token receives, the mean over all tokens of its prompt: (I, n)."""
        queries, keys, mask = self._rotated()
        found = attention_maps.received(queries, keys, mask, self.layout.real)
        return self._of_images(found[:, self.past :])

    def last_attention(self) -> Tensor:
        """Attention of each prompt's last token to its images' tokens: (I, n)."""
        queries, keys, mask = self._rotated()
        batch, length = self.layout.shape
        last = torch.full((batch, 1), length - 1, device=keys.device)
        if self.layout.real is not None:
            position = torch.arange(length, device=keys.device)
            last = (position * self.layout.real).argmax(1, keepdim=True)
        found = attention_maps.attention(_rows(queries, last), keys, _mask_rows(mask, last))
        return self._of_images(found[:, 0, self.past :])

    def text_attention(self) -> Tensor:
        """Attention of each text token after an image to its tokens: (I, Q, n)."""
        queries, keys, mask = self._rotated()
        at, _ = prompt_layout.text(self.layout, self.group)
        row, length = self.layout.row(self.group), self.layout.shape[1]
        mask = _mask_rows(mask.expand(len(keys), -1, -1, -1)[row], at)
        found = attention_maps.attention(_rows(queries[row], at), keys[row], mask)[..., self.past :]
        columns = self.layout.images[self.group] - row.unsqueeze(1) * length  # (I, n)
        return found.gather(2, columns.unsqueeze(1).expand(-1, at.shape[1], -1))

    def text(self, source: Tensor) -> Tensor:
        """The text tokens after each image (I, Q, D), of `source` (B, T, D)."""
        at, _ = prompt_layout.text(self.layout, self.group)
        wide = torch.promote_types(source.dtype, torch.float32)
        return gather_tokens(source[self.layout.row(self.group)], at).to(wide)

    def text_mask(self) -> Tensor:
        """Which of them are text, and not padding: (I, Q)."""
        return prompt_layout.text(self.layout, self.group)[1]

    def _captured(self, found: Tensor | None) -> Tensor:
        if found is None:
            raise RuntimeError(
                "a layer that is to merge computed no queries or keys: its projections were replaced after "
                "apply; apply again"
            )
        return found

    def _rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, C) and keys (B, H', P + T, C) with their positions, and the additive mask."""
        queries, keys = self._captured(self.queries), self._captured(self.keys)
        cos, sin = (x.to(keys.device) for x in self.rotation)
        queries = attention_maps.apply_rope(queries, cos, sin)
        keys = attention_maps.apply_rope(keys, cos, sin)
        if self.past:
            keys = torch.cat([self.cached(self.past).to(keys.device, keys.dtype), keys], 2)
        mask = self.mask if self.mask is None else self.mask.to(keys.device)
        if mask is None or mask.ndim == 2:  # none, or flash attention's padding mask
            length = queries.shape[2]
            now = SegmentCache(self.past + length, None if mask is None else mask.bool())
            mask = kv_cache.mask(now, length, False, torch.float32, keys.device)
        if mask is None:  # a single token, which sees everything
            mask = torch.zeros(1, 1, 1, keys.shape[2], device=keys.device)
        return queries, keys, mask

    def _of_images(self, found: Tensor) -> Tensor:
        """Values of all tokens (B, T), for the images' tokens (I, n)."""
        return found.flatten()[self.layout.images[self.group]]


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """The tokens `at` (B, Q) of x (B, H, T, C): (B, H, Q, C)."""
    batch, count = at.shape
    return x.gather(2, at[:, None, :, None].expand(batch, x.shape[1], count, x.shape[3]))


def _mask_rows(mask: Tensor, at: Tensor) -> Tensor:
    """The rows `at` (B, Q) of a mask (B or 1, 1, T or 1, P + T)."""
    if mask.shape[2] == 1:
        return mask
    batch, count = at.shape
    mask = mask.expand(batch, -1, -1, -1)
    return mask.gather(2, at[:, None, :, None].expand(batch, 1, count, mask.shape[3]))
