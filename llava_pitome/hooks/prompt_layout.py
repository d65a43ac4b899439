"""Where the images of a batch of prompts are, and which tokens remain when some of theirs merge.

Prompts differ in length and in the number of their images, so that fewer tokens can need different padding. All
images have the same number of tokens.
Shapes: B prompts, T tokens of the longest, I images over all prompts, n tokens an image before a merge, m after it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan, gather_tokens


class PromptLayout(NamedTuple):
    """A batch of prompts in one segment of the language model.

    Attributes:
        images: (I, n) index of each image token, counted over all prompts: prompt * T + position.
        counts: images of each prompt.
        real: (B, T) False for padding; None: there is none.
        lengths: tokens of each prompt without padding.
        origin: (B, T) position of each token before the first layer; None: its own.
        current: (B, T before the first layer) position now of each token of the prompt, or of the token it merged
            into; None: its own.
        shape: B and T.
        num_prefix_tokens: tokens before each image's patches that never merge.
    """

    images: Tensor
    counts: tuple[int, ...]
    real: Tensor | None
    lengths: tuple[int, ...]
    origin: Tensor | None
    current: Tensor | None
    shape: tuple[int, int]
    num_prefix_tokens: int

    @property
    def row(self) -> Tensor:
        """(I,) the prompt of each image."""
        return self.images[:, 0] // self.shape[1]

    def to(self, device: torch.device) -> "PromptLayout":
        """The same on a device: layers may be on several."""
        moved = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**moved)


def locate(
    is_image: Tensor, tokens_per_image: int, num_prefix_tokens: int, real: Tensor | None
) -> PromptLayout:
    """The layout of a batch of prompts before the first layer.

    Args:
        is_image: (B, T) True at every image token.
        tokens_per_image: with prefix tokens.
        num_prefix_tokens: tokens before each image's patches that never merge.
        real: (B, T) False for padding, or None.

    Raises:
        ValueError: a prompt holds a part of an image only, or an image is masked.
    """
    batch, length = is_image.shape
    tokens = is_image.sum(1).tolist()
    if partial := [n for n in tokens if n % tokens_per_image]:
        raise ValueError(
            f"a prompt holds {partial[0]} image tokens, which are not whole images of {tokens_per_image}: tokens "
            "merge image by image, so a prompt cannot be prefilled in chunks that cut one"
        )
    images = is_image.flatten().nonzero().view(-1, tokens_per_image)[:, num_prefix_tokens:]
    lengths = [length] * batch if real is None else real.sum(1).tolist()
    if min(lengths) == length:
        real = None
    if real is not None and bool((is_image & ~real).any()):
        raise ValueError("attention_mask hides image tokens; tokens that merge must be visible")
    counts = tuple(n // tokens_per_image for n in tokens)
    return PromptLayout(images, counts, real, tuple(lengths), None, None, (batch, length), num_prefix_tokens)


def tokens_after_images(layout: PromptLayout) -> int:
    """Tokens after the last image of any prompt, padding included."""
    return layout.shape[1] - 1 - int((layout.images % layout.shape[1]).max())


class Shortening(NamedTuple):
    """How a batch of prompts becomes shorter.

    Attributes:
        index: (B, T') the position before the merge of each token after it; arbitrary at padding.
        kept: (I, m) index of the images' kept tokens after the merge, counted over all prompts.
        after: the layout after the merge.
    """

    index: Tensor
    kept: Tensor
    after: PromptLayout


def shorten(layout: PromptLayout, plan: MergePlan) -> Shortening:
    """The prompts without the tokens of each image (I, n) that `plan` merges into others; all keep their order."""
    batch, before = layout.shape
    fewer = plan.gone.shape[1]
    lengths = tuple(n - k * fewer for n, k in zip(layout.lengths, layout.counts))
    after = max(lengths)
    device = plan.slot.device
    remains = torch.ones(batch * before, dtype=torch.bool, device=device)
    if layout.real is not None:
        remains &= layout.real.flatten()
    remains[layout.images.gather(1, plan.gone).flatten()] = False
    remains = remains.view(batch, before)
    index = _remaining(remains, after, layout.real)
    real = remains.gather(1, index)
    current = torch.zeros(batch, before, dtype=torch.long, device=device)
    position = torch.arange(after, device=device).expand(batch, -1)
    current.scatter_(1, index, position * real)  # padding writes 0 at positions that do not remain
    start = layout.row.unsqueeze(1) * after
    kept = current.flatten()[layout.images.gather(1, plan.kept)] + start  # (I, m)
    current.view(-1)[layout.images.flatten()] = (kept.gather(1, plan.slot) - start).flatten()
    origin = index if layout.origin is None else layout.origin.gather(1, index)
    current = current if layout.current is None else current.gather(1, layout.current)
    real = None if min(lengths) == after else real
    shorter = PromptLayout(
        kept, layout.counts, real, lengths, origin, current, (batch, after), layout.num_prefix_tokens
    )
    return Shortening(index, kept, shorter)


def _remaining(remains: Tensor, length: int, real: Tensor | None) -> Tensor:
    """(B, length) positions of the tokens that remain, padded on the side on which the prompts were."""
    right = real is not None and bool(real[:, 0].all())
    if right:
        return remains.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    return remains.to(torch.uint8).argsort(dim=1, stable=True)[:, remains.shape[1] - length :]


def replace(x: Tensor, short: Shortening, merged: Tensor) -> Tensor:
    """The hidden states (B, T, D) of the tokens that remain, with merged ones (I, m, D) for the images' own."""
    out = gather_tokens(x, short.index)
    width = x.shape[2]
    return out.view(-1, width).index_copy(0, short.kept.flatten(), merged.reshape(-1, width)).view_as(out)


def original_positions(layout: PromptLayout, positions: Tensor, kept: Tensor, patches: int) -> Tensor:
    """Position ids (B, T) as they would be if every image still had all of its patches.

    Args:
        layout: before the first layer.
        positions: (B or 1, T) counting the tokens.
        kept: (I, n) raster index of each image token's patch.
        patches: of an image.
    """
    batch, length = layout.shape
    positions = positions.expand(batch, -1)
    images = layout.images.to(positions.device)
    ends = torch.zeros(batch * length, dtype=positions.dtype, device=positions.device)
    ends[images[:, -1]] = 1
    ends = ends.view(batch, length)
    missing = (ends.cumsum(1) - ends) * (patches - images.shape[1])  # of the images before each token
    out = (positions + missing).flatten()
    out[images.flatten()] = (out[images[:, :1]] + kept.to(out.device)).flatten()
    return out.view(batch, length)


def text(layout: PromptLayout) -> tuple[Tensor, Tensor]:
    """The text after each image's start: positions (I, Q) in its prompt, and which of them are text."""
    batch, length = layout.shape
    device = layout.images.device
    is_text = torch.ones(batch * length, dtype=torch.bool, device=device)
    is_text[layout.images.flatten()] = False
    for before in range(1, layout.num_prefix_tokens + 1):
        is_text[layout.images.amin(1) - before] = False
    is_text = is_text.view(batch, length)
    if layout.real is not None:
        is_text &= layout.real
    each = is_text[layout.row]  # (I, T)
    start = layout.images[:, :1] - layout.row.unsqueeze(1) * length
    each = each & (torch.arange(length, device=device) > start)
    most = max(n - k * layout.images.shape[1] for n, k in zip(layout.lengths, layout.counts))
    most = max(min(most, length), 1)
    index = each.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, each.gather(1, index)
