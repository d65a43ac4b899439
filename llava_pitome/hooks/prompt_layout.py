"""Where the images of a batch of prompts are, and which tokens remain when some of theirs merge.

Prompts differ in length and in the number of their images, so that fewer tokens can need different padding.
Images of equally many tokens form a group, in which they merge as one batch.
Shapes: B prompts, T tokens of the longest, I images of a group over all prompts, n tokens an image before a
merge, m after it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan, gather_tokens


class PromptLayout(NamedTuple):
    """A batch of prompts in one segment of the language model.

    Attributes:
        images: of each group, (I, n) index of each image token, counted over all prompts: prompt * T +
            position.
        rows: of each group, the prompt of each image.
        real: (B, T) False for padding; None: there is none.
        lengths: tokens of each prompt without padding.
        origin: (B, T) position of each token before the first layer; None: its own.
        current: (B, T before the first layer) position now of each token of the prompt, or of the token it
            merged into; None: its own.
        shape: B and T.
        num_prefix_tokens: tokens before each image's patches that never merge.
    """

    images: tuple[Tensor, ...]
    rows: tuple[tuple[int, ...], ...]
    real: Tensor | None
    lengths: tuple[int, ...]
    origin: Tensor | None
    current: Tensor | None
    shape: tuple[int, int]
    num_prefix_tokens: int

    def row(self, group: int) -> Tensor:
        """(I,) the prompt of each image of a group."""
        return self.images[group][:, 0] // self.shape[1]

    def to(self, device: torch.device) -> "PromptLayout":
        """The same on a device: layers may be on several."""
        moved = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(images=tuple(x.to(device) for x in self.images), **moved)


def locate(
    is_image: Tensor, lengths: int | Sequence[int], num_prefix_tokens: int, real: Tensor | None
) -> PromptLayout:
    """The layout of a batch of prompts before the first layer.

    Args:
        is_image: (B, T) True at every image token.
        lengths: tokens of an image, prefix tokens included; of each image in order, where they differ.
        num_prefix_tokens: tokens before each image's patches that never merge.
        real: (B, T) False for padding, or None.

    Raises:
        ValueError: a prompt holds a part of an image only, or an image is masked.
    """
    batch, width = is_image.shape
    tokens = is_image.sum(1).tolist()
    of_rows = _lengths_of_rows(tokens, lengths)
    index = is_image.flatten().nonzero().flatten()
    groups: dict[int, list[tuple[int, int]]] = {}  # first index and row of images, by their length
    first = 0
    for row, row_lengths in enumerate(of_rows):
        for length in row_lengths:
            groups.setdefault(length, []).append((first, row))
            first += length
    images, rows = [], []
    for length, members in groups.items():
        starts = torch.tensor([start for start, _ in members], device=index.device)
        own = torch.arange(num_prefix_tokens, length, device=index.device)
        images.append(index[starts.unsqueeze(1) + own])
        rows.append(tuple(row for _, row in members))
    real_lengths = [width] * batch if real is None else real.sum(1).tolist()
    if min(real_lengths) == width:
        real = None
    if real is not None and bool((is_image & ~real).any()):
        raise ValueError("attention_mask hides image tokens; tokens that merge must be visible")
    return PromptLayout(
        tuple(images), tuple(rows), real, tuple(real_lengths), None, None, (batch, width), num_prefix_tokens
    )


def _lengths_of_rows(tokens: Sequence[int], lengths: int | Sequence[int]) -> list[list[int]]:
    """The tokens of each image of each prompt.

    Args:
        tokens: image tokens of each prompt.
        lengths: as for `locate`.

    Raises:
        ValueError: a prompt holds a part of an image only.
    """
    found: list[list[int]] = []
    following = None if isinstance(lengths, int) else iter(lengths)
    for count in tokens:
        row: list[int] = []
        while sum(row) < count:
            length = lengths if following is None else next(following, count + 1)
            row.append(length)
        if sum(row) != count:
            of = (
                f" of {lengths}"
                if isinstance(lengths, int)
                else f": they have {', '.join(map(str, lengths))}"
            )
            raise ValueError(
                f"a prompt holds {count} image tokens, which are not whole images{of}: "
                "tokens merge image by image, so a prompt cannot be prefilled in chunks that cut one"
            )
        found.append(row)
    return found


def tokens_after_images(layout: PromptLayout) -> int:
    """Tokens after the last image of any prompt, padding included."""
    last = max(int((images % layout.shape[1]).max()) for images in layout.images)
    return layout.shape[1] - 1 - last


class Shortening(NamedTuple):
    """How a batch of prompts becomes shorter.

    Attributes:
        index: (B, T') the position before the merge of each token after it; arbitrary at padding.
        kept: of each group, (I, m) index of the images' kept tokens after the merge, as in PromptLayout.
        after: the layout after the merge.
    """

    index: Tensor
    kept: tuple[Tensor, ...]
    after: PromptLayout


def shorten(layout: PromptLayout, plans: Sequence[MergePlan]) -> Shortening:
    """The prompts without the tokens of each group's images (I, n) that its plan merges, in order."""
    batch, before = layout.shape
    removed = [0] * batch
    for plan, rows in zip(plans, layout.rows):
        for row in rows:
            removed[row] += plan.gone.shape[1]
    lengths = tuple(n - fewer for n, fewer in zip(layout.lengths, removed))
    after = max(lengths)
    device = layout.images[0].device
    remains = torch.ones(batch * before, dtype=torch.bool, device=device)
    if layout.real is not None:
        remains &= layout.real.flatten()
    for images, plan in zip(layout.images, plans):
        remains[images.gather(1, plan.gone).flatten()] = False
    remains = remains.view(batch, before)
    index = _remaining(remains, after, layout.real)
    real = remains.gather(1, index)
    current = torch.zeros(batch, before, dtype=torch.long, device=device)
    position = torch.arange(after, device=device).expand(batch, -1)
    current.scatter_(1, index, position * real)  # padding writes 0 at positions that do not remain
    all_kept = []
    for g, (images, plan) in enumerate(zip(layout.images, plans)):
        start = layout.row(g).unsqueeze(1) * after
        kept = current.flatten()[images.gather(1, plan.kept)] + start  # (I, m)
        current.view(-1)[images.flatten()] = (kept.gather(1, plan.slot) - start).flatten()
        all_kept.append(kept)
    origin = index if layout.origin is None else layout.origin.gather(1, index)
    current = current if layout.current is None else current.gather(1, layout.current)
    real = None if min(lengths) == after else real
    shorter = PromptLayout(
        tuple(all_kept), layout.rows, real, lengths, origin, current, (batch, after), layout.num_prefix_tokens
    )
    return Shortening(index, tuple(all_kept), shorter)


def _remaining(remains: Tensor, length: int, real: Tensor | None) -> Tensor:
    """(B, length) positions of the tokens that remain, padded on the side on which the prompts were."""
    right = real is not None and bool(real[:, 0].all())
    if right:
        return remains.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    return remains.to(torch.uint8).argsort(dim=1, stable=True)[:, remains.shape[1] - length :]


def replace(x: Tensor, short: Shortening, merged: Sequence[Tensor]) -> Tensor:
    """The hidden states (B, T, D) of the tokens that remain, each group's images replaced (I, m, D)."""
    out = gather_tokens(x, short.index)
    width = x.shape[2]
    index = torch.cat([kept.flatten() for kept in short.kept])
    tokens = torch.cat([y.reshape(-1, width) for y in merged])
    return out.view(-1, width).index_copy(0, index, tokens).view_as(out)


def original_positions(
    layout: PromptLayout, positions: Tensor, kept: Sequence[Tensor], patches: Sequence[Tensor]
) -> Tensor:
    """Position ids (B, T) as they would be if every image still had all of its patches.

    Args:
        layout: before the first layer.
        positions: (B or 1, T) counting the tokens.
        kept: of each group, (I, n) raster index of each image token's patch.
        patches: of each group, (I,) the patches of its images.
    """
    batch, length = layout.shape
    positions = positions.expand(batch, -1)
    groups = [images.to(positions.device) for images in layout.images]
    fewer = torch.zeros(batch * length, dtype=positions.dtype, device=positions.device)
    for images, whole in zip(groups, patches):
        fewer[images[:, -1]] = (whole - images.shape[1]).to(positions)
    fewer = fewer.view(batch, length)
    missing = fewer.cumsum(1) - fewer  # of the images before each token
    out = (positions + missing).flatten()
    for images, own in zip(groups, kept):
        out[images.flatten()] = (out[images[:, :1]] + own.to(out.device)).flatten()
    return out.view(batch, length)


def text(layout: PromptLayout, group: int) -> tuple[Tensor, Tensor]:
    """The text after each image's start: positions (I, Q) in its prompt, and which of them are text."""
    batch, length = layout.shape
    own = layout.images[group]
    is_text = torch.ones(batch * length, dtype=torch.bool, device=own.device)
    image_tokens = [0] * batch
    for images, rows in zip(layout.images, layout.rows):
        is_text[images.flatten()] = False
        for before in range(1, layout.num_prefix_tokens + 1):
            is_text[images.amin(1) - before] = False
        for row in rows:
            image_tokens[row] += images.shape[1]
    is_text = is_text.view(batch, length)
    if layout.real is not None:
        is_text &= layout.real
    row = layout.row(group)
    each = is_text[row]  # (I, T)
    start = own[:, :1] - row.unsqueeze(1) * length
    each = each & (torch.arange(length, device=own.device) > start)
    most = max(n - fewer for n, fewer in zip(layout.lengths, image_tokens))
    most = max(min(most, length), 1)
    index = each.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, each.gather(1, index)
