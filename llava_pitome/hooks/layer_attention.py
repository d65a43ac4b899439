"""What a method may ask about a language model's layer that merges: who attends to the image, and the text.

Worked out from the layer's own queries, keys and mask, for the rows that are asked for; no kernel has to hand
attention maps out.
Shapes: B prompts, T tokens, P tokens in the cache, I images, n tokens an image, Q text tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_pitome.hooks import attention_scores as scores
from llava_pitome.hooks import kv_cache as pasts
from llava_pitome.hooks import prompt_layout as prompts
from llava_pitome.hooks.attention_capture import AttentionCapture
from llava_pitome.hooks.kv_cache import SegmentCache
from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens


class LayerAttention(NamedTuple):
    """A layer in the middle of a pass.

    Attributes:
        look: what its projections made.
        prompt: where the images are.
        mask: the attention mask that it was given, (B or 1, 1, T, P + T), or None.
        turns: cosine and sine (B or 1, T, C) of the positions.
        cached: from the number of tokens P to their keys in the cache (B, H, P, C).
        past: P.
        grid: rows and columns of patches.
    """

    look: AttentionCapture
    prompt: PromptLayout
    mask: Tensor | None
    turns: tuple[Tensor, Tensor]
    cached: Callable[[int], Tensor]
    past: int
    grid: Callable[[], tuple[int, int]]

    def offers(self, source: Tensor) -> dict[str, Callable[[], Any]]:
        """What methods may need, by its name in GIVEN; `source` (B, T, D) is what the metric comes from."""
        return {
            "received_attention": self.received,
            "last_attention": self.last,
            "text_attention": self.by_text,
            "text": partial(self.text, source),
            "text_mask": self.asks,
            "grid": self.grid,
        }

    def received(self) -> Tensor:
        """Attention that each image token gets, the mean over all tokens of its prompt: (I, n)."""
        queries, keys, mask = self._attention()
        found = scores.received(queries, keys, *self._heads, mask, self.prompt.real)
        return self._of_images(found[:, self.past :])

    def last(self) -> Tensor:
        """The attention of each prompt's last token to its images' tokens: (I, n)."""
        queries, keys, mask = self._attention()
        batch, length = self.prompt.shape
        at = torch.full((batch, 1), length - 1, device=keys.device)
        if self.prompt.real is not None:
            here = torch.arange(length, device=keys.device)
            at = (here * self.prompt.real).argmax(1, keepdim=True)
        found = scores.attention(gather_tokens(queries, at), keys, *self._heads, _picked(mask, at))
        return self._of_images(found[:, 0, self.past :])

    def by_text(self) -> Tensor:
        """The attention of each text token behind an image to its tokens: (I, Q, n)."""
        queries, keys, mask = self._attention()
        at, _ = prompts.text(self.prompt)
        row, length = self.prompt.row, self.prompt.shape[1]
        mask = _picked(mask.expand(len(keys), -1, -1, -1)[row], at)
        found = scores.attention(gather_tokens(queries[row], at), keys[row], *self._heads, mask)[
            ..., self.past :
        ]
        columns = self.prompt.images - row.unsqueeze(1) * length  # (I, n)
        return found.gather(2, columns.unsqueeze(1).expand(-1, at.shape[1], -1))

    def text(self, source: Tensor) -> Tensor:
        """The text tokens behind each image (I, Q, D), of `source` (B, T, D)."""
        at, _ = prompts.text(self.prompt)
        wide = torch.promote_types(source.dtype, torch.float32)
        return gather_tokens(source[self.prompt.row], at).to(wide)

    def asks(self) -> Tensor:
        """Which of them are there, and not padding: (I, Q)."""
        return prompts.text(self.prompt)[1]

    @property
    def _heads(self) -> tuple[int, int]:
        return self.look.block.heads, self.look.block.key_heads

    def _attention(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H * C) and keys (B, P + T, H' * C) with their positions, and the additive mask."""
        queries, keys = self.look.queries_and_keys()
        turns = [x.to(keys.device) for x in self.turns]
        queries = scores.apply_rope(queries, self._heads[0], *turns)
        keys = scores.apply_rope(keys, self._heads[1], *turns)
        if self.past:
            before = self.cached(self.past).to(keys.device).transpose(1, 2).flatten(2)
            keys = torch.cat([before.to(keys.dtype), keys], 1)
        mask = self.mask if self.mask is None else self.mask.to(keys.device)
        if mask is None:
            length = queries.shape[1]
            mask = pasts.mask(SegmentCache(self.past + length), length, False, torch.float32, keys.device)
        if mask is None:  # a single token, which sees everything
            mask = torch.zeros(1, 1, 1, keys.shape[1], device=keys.device)
        return queries, keys, mask

    def _of_images(self, found: Tensor) -> Tensor:
        """What is known of each token (B, T), for the images' tokens (I, n)."""
        return found.flatten()[self.prompt.images]


def _picked(mask: Tensor, at: Tensor) -> Tensor:
    """The rows `at` (B, Q) of a mask (B or 1, 1, T or 1, P + T)."""
    if mask.shape[2] == 1:
        return mask
    batch, count = at.shape
    mask = mask.expand(batch, -1, -1, -1)
    return mask.gather(2, at[:, None, :, None].expand(batch, 1, count, mask.shape[3]))
