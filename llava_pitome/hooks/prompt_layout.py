"""Where the images of a batch of prompts are, and which tokens are left when some of theirs go.

Prompts differ in length and in the number of their images, so that fewer tokens can mean another padding. All
images have the same number of tokens.
Shapes: B prompts, T tokens of the longest, I images over all prompts, n tokens an image.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan, gather_tokens


class PromptLayout(NamedTuple):
    """A batch of prompts at some depth of the language model.

    Attributes:
        images: (I, n) where each image token is, counted over all prompts: prompt * T + position.
        counts: images of each prompt.
        real: (B, T) False for padding; None: there is none.
        lengths: tokens of each prompt without padding.
        origin: (B, T) where each token stood in front of the first layer; None: where it stands.
        into: (B, T at the first layer) where each token of the prompt, or what it merged into, stands now;
            None: where it stood.
        shape: B and T.
        front: tokens in front of each image's patches that never merge.
    """

    images: Tensor
    counts: tuple[int, ...]
    real: Tensor | None
    lengths: tuple[int, ...]
    origin: Tensor | None
    into: Tensor | None
    shape: tuple[int, int]
    front: int

    @property
    def row(self) -> Tensor:
        """(I,) the prompt of each image."""
        return self.images[:, 0] // self.shape[1]

    def to(self, device: torch.device) -> "PromptLayout":
        """The same on a device: layers may lie on several."""
        moved = {k: v.to(device) for k, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**moved)


def find(is_image: Tensor, each: int, front: int, real: Tensor | None) -> PromptLayout:
    """The images of a batch of prompts in front of the first layer.

    Args:
        is_image: (B, T) True at every image token.
        each: tokens an image, those in front included.
        front: tokens in front of each image's patches that never merge.
        real: (B, T) False for padding, or None.

    Raises:
        ValueError: an image is there in part only, or masked.
    """
    batch, length = is_image.shape
    tokens = is_image.sum(1).tolist()
    if wrong := [n for n in tokens if n % each]:
        raise ValueError(
            f"a prompt holds {wrong[0]} image tokens, which are not whole images of {each}: tokens merge "
            "image by image, so a prompt cannot be prefilled in chunks that cut one"
        )
    images = is_image.flatten().nonzero().view(-1, each)[:, front:]
    lengths = [length] * batch if real is None else real.sum(1).tolist()
    if min(lengths) == length:
        real = None
    if real is not None and bool((is_image & ~real).any()):
        raise ValueError("attention_mask hides image tokens; tokens that merge must be seen")
    counts = tuple(n // each for n in tokens)
    return PromptLayout(images, counts, real, tuple(lengths), None, None, (batch, length), front)


def behind(prompt: PromptLayout) -> int:
    """Tokens behind the last image of any prompt, padding included."""
    return prompt.shape[1] - 1 - int((prompt.images % prompt.shape[1]).max())


class Shortening(NamedTuple):
    """How a batch of prompts becomes shorter.

    Attributes:
        index: (B, T') the token that each of those left was; at padding, any.
        heirs: (I, m) where the images' survivors stand now, counted over all prompts.
        after: the prompts behind it.
    """

    index: Tensor
    heirs: Tensor
    after: PromptLayout


def shorten(prompt: PromptLayout, plan: MergePlan) -> Shortening:
    """The prompts without the tokens of each image (I, n) that `plan` lets go; the others keep order."""
    batch, before = prompt.shape
    fewer = plan.gone.shape[1]
    lengths = tuple(n - k * fewer for n, k in zip(prompt.lengths, prompt.counts))
    after = max(lengths)
    device = plan.slot.device
    stays = torch.ones(batch * before, dtype=torch.bool, device=device)
    if prompt.real is not None:
        stays &= prompt.real.flatten()
    stays[prompt.images.gather(1, plan.gone).flatten()] = False
    stays = stays.view(batch, before)
    index = _left(stays, after, prompt.real)
    real = stays.gather(1, index)
    place = torch.zeros(batch, before, dtype=torch.long, device=device)
    here = torch.arange(after, device=device).expand(batch, -1)
    place.scatter_(1, index, here * real)  # padding writes 0 at places that do not stay
    start = prompt.row.unsqueeze(1) * after
    heirs = place.flatten()[prompt.images.gather(1, plan.kept)] + start  # (I, m)
    place.view(-1)[prompt.images.flatten()] = (heirs.gather(1, plan.slot) - start).flatten()
    origin = index if prompt.origin is None else prompt.origin.gather(1, index)
    into = place if prompt.into is None else place.gather(1, prompt.into)
    real = None if min(lengths) == after else real
    left = PromptLayout(heirs, prompt.counts, real, lengths, origin, into, (batch, after), prompt.front)
    return Shortening(index, heirs, left)


def _left(stays: Tensor, length: int, real: Tensor | None) -> Tensor:
    """(B, length) positions of the tokens that stay, padded on the side on which the prompts were."""
    right = real is not None and bool(real[:, 0].all())
    if right:
        return stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    return stays.to(torch.uint8).argsort(dim=1, stable=True)[:, stays.shape[1] - length :]


def replace(x: Tensor, short: Shortening, merged: Tensor) -> Tensor:
    """The hidden state (B, T, D) of the tokens that stay, with merged ones (I, m, D) for the images' own."""
    out = gather_tokens(x, short.index)
    width = x.shape[2]
    return out.view(-1, width).index_copy(0, short.heirs.flatten(), merged.reshape(-1, width)).view_as(out)


def unpacked(prompt: PromptLayout, positions: Tensor, places: Tensor, patches: int) -> Tensor:
    """Positions (B, T) as they would be if every image still had all of its patches.

    Args:
        prompt: in front of the first layer.
        positions: (B or 1, T) counted through the tokens that there are.
        places: (I, n) where in an image's raster each of its tokens belongs.
        patches: of an image.
    """
    batch, length = prompt.shape
    positions = positions.expand(batch, -1)
    images = prompt.images.to(positions.device)
    ends = torch.zeros(batch * length, dtype=positions.dtype, device=positions.device)
    ends[images[:, -1]] = 1
    ends = ends.view(batch, length)
    missing = (ends.cumsum(1) - ends) * (patches - images.shape[1])  # of the images in front of each token
    out = (positions + missing).flatten()
    out[images.flatten()] = (out[images[:, :1]] + places.to(out.device)).flatten()
    return out.view(batch, length)


def text(prompt: PromptLayout) -> tuple[Tensor, Tensor]:
    """Where the text behind each image's start is: positions (I, Q) in its prompt, and which are real."""
    batch, length = prompt.shape
    device = prompt.images.device
    is_text = torch.ones(batch * length, dtype=torch.bool, device=device)
    is_text[prompt.images.flatten()] = False
    for ahead in range(1, prompt.front + 1):
        is_text[prompt.images.amin(1) - ahead] = False
    is_text = is_text.view(batch, length)
    if prompt.real is not None:
        is_text &= prompt.real
    each = is_text[prompt.row]  # (I, T)
    start = prompt.images[:, :1] - prompt.row.unsqueeze(1) * length
    each = each & (torch.arange(length, device=device) > start)
    most = max(n - k * prompt.images.shape[1] for n, k in zip(prompt.lengths, prompt.counts))
    most = max(min(most, length), 1)
    index = each.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, each.gather(1, index)
