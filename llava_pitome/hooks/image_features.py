"""What is known of images that were encoded, and recognising their features by value.

Between two modules features are passed on by others: slices of hidden states reach the projector, generate
repeats projected features for beams, users keep them for a second question. So they are recognised by the
values of a few of their tokens, and nothing is said of features that are not those of an image that was
encoded. Where prompts come without ids, as those of the original package do, images are also located in them
that way.
Shapes: P images that were encoded, I images in B prompts of T tokens, n tokens an image, D channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan

PROBES = 4  # tokens of an image that are compared
CHANNELS = 8  # channels that are compared at every position of a prompt, before the others are at a few


class ImageRecord(NamedTuple):
    """Images that were encoded together, as they reached the language model.

    Attributes:
        probes: (P, K, D) evenly spread tokens of each.
        length: tokens of an image, prefix tokens included.
        num_prefix_tokens: prefix tokens among them, which are not compared.
        patches: of an image, in the tower.
        sizes: (P, n) patches that each token stands for; None where none merged.
        kept: (P, n) the position of each token in the raster of the patches; None as for `sizes`.
    """

    probes: Tensor
    length: int
    num_prefix_tokens: int
    patches: int
    sizes: Tensor | None
    kept: Tensor | None

    def starts_with(self, features: Tensor) -> bool:
        """Whether features (tokens, D) begin as those of one of the images."""
        prefix = self.num_prefix_tokens
        if len(features) <= prefix or features.shape[1] != self.probes.shape[2]:
            return False
        known = self.probes[:, 0].to(features.device, features.dtype)
        return bool(_equal(features.detach()[prefix], known).all(1).any())

    def locate(self, hidden: Tensor) -> Tensor:
        """Where prompts (B, T, D) hold the images: True (B, T).

        Raises:
            ValueError: a prompt holds a part of an image only.
        """
        prefix, length = self.num_prefix_tokens, hidden.shape[1]
        is_image = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        hidden, known = hidden.detach(), self.probes.to(hidden.device)
        firsts = _equal(hidden[:, None, :, :CHANNELS], known[:, None, 0, :CHANNELS]).all(3)  # (B, P, T)
        row, image, position = firsts.nonzero(as_tuple=True)
        equal = _equal(hidden[row, position], known[image, 0]).all(1)
        row, image, position = row[equal], image[equal], position[equal]
        fits = (position >= prefix) & (position - prefix + self.length <= length)
        starts = row[fits], image[fits], position[fits]
        for k, offset in enumerate(_spread(self.length - prefix)):
            equal = _equal(hidden[starts[0], starts[2] + offset], known[starts[1], k]).all(1)
            starts = tuple(x[equal] for x in starts)
        for i in range(self.length):
            is_image[starts[0], starts[2] - prefix + i] = True
        if not bool(is_image[row, position].all()):
            raise ValueError(
                "a prompt holds the beginning of an image only, as where it is longer than "
                "tokenizer_model_max_length: tokens merge image by image"
            )
        return is_image

    def which(self, hidden: Tensor, images: Tensor) -> Tensor | None:
        """The index (I,) of the encoded image that each image of some prompts is.

        None where one of them is none of the encoded images.

        Args:
            hidden: (B, T, D) the prompts.
            images: (I, n) positions of the images' tokens, counted over all prompts.
        """
        if self.length - self.num_prefix_tokens != images.shape[1]:
            return None
        probed = hidden.detach().flatten(0, 1)[probe(images)]  # (I, K, D)
        known = self.probes.to(probed.device, probed.dtype)
        same = _equal(probed.unsqueeze(1), known.unsqueeze(0)).flatten(2).all(2)  # (I, P)
        return same.to(torch.uint8).argmax(1) if bool(same.any(1).all()) else None

    def images_at(self, which: Tensor) -> "RecordedImages":
        """What is known of some of the images, `which` (I,)."""
        sizes, kept = (None if x is None else x[which.to(x.device)] for x in (self.sizes, self.kept))
        return RecordedImages(sizes, kept, torch.full_like(which, self.patches))


class RecordedImages(NamedTuple):
    """What is known of images of equally many tokens in some prompts.

    Attributes:
        sizes: (I, n) patches that each token stands for; None where none merged.
        kept: (I, n) the position of each token in the raster of the patches; None as for `sizes`.
        patches: (I,) of each image.
    """

    sizes: Tensor | None
    kept: Tensor | None
    patches: Tensor


def find_images(records: Sequence[ImageRecord], hidden: Tensor, images: Tensor) -> RecordedImages | None:
    """What is known of images in prompts; None where one of them is in no record.

    Args:
        records: of images that were encoded, the last first.
        hidden: (B, T, D) the prompts.
        images: (I, n) positions of the images' tokens, counted over all prompts.
    """
    for record in records:  # most often all images are of one record
        which = record.which(hidden, images)
        if which is not None:
            return record.images_at(which)
    rows = []
    for image in images.split(1):
        found = ((record, record.which(hidden, image)) for record in records)
        known = next(((record, which) for record, which in found if which is not None), None)
        if known is None:
            return None
        rows.append(known[0].images_at(known[1]))
    if all(row.sizes is None for row in rows):
        return RecordedImages(None, None, torch.cat([row.patches for row in rows]))
    device = images.device
    ones = torch.ones(1, images.shape[1], device=device)
    own = torch.arange(images.shape[1], device=device).unsqueeze(0)
    sizes = [(ones if row.sizes is None else row.sizes).to(device) for row in rows]
    kept = [(own if row.kept is None else row.kept).to(device) for row in rows]
    return RecordedImages(torch.cat(sizes), torch.cat(kept), torch.cat([row.patches for row in rows]))


def record_images(
    features: Tensor, num_prefix_tokens: int, patches: int, sizes: Tensor, plans: Sequence[MergePlan]
) -> ImageRecord:
    """The record of images that were encoded.

    Args:
        features: (P, prefix + n, D) as they leave the projector.
        num_prefix_tokens: prefix tokens among them.
        patches: of an image, in the tower.
        sizes: (P, n) patches that each token stands for.
        plans: the merges that led there; empty where none did.
    """
    probes = probe(features.detach()[:, num_prefix_tokens:])
    kept = plans[0].kept if plans else None
    for plan in plans[1:]:
        kept = kept.gather(1, plan.kept)
    return ImageRecord(probes, features.shape[1], num_prefix_tokens, patches, sizes if plans else None, kept)


def record_packed(features: Tensor, sizes: Tensor | None, kept: Tensor | None, patches: int) -> ImageRecord:
    """The record of images of a model that packs several tiles, of one layout.

    Args:
        features: (P, n, D) as they reach the language model.
        sizes: (P, n) tokens that each token stands for, as for ImageRecord.
        kept: (P, n) positions in the sequence that the model packs without merging.
        patches: tokens of that sequence.
    """
    return ImageRecord(probe(features.detach()), features.shape[1], 0, patches, sizes, kept)


def probe(x: Tensor) -> Tensor:
    """Evenly spread tokens of each image: (I, n, ...) to (I, PROBES or less, ...)."""
    return x[:, _spread(x.shape[1])]


def is_same(probes: Tensor, features: Tensor) -> Tensor:
    """Whether features (I, n, D) are those of the same images as probes (I, K, D): a scalar tensor."""
    return _equal(probe(features.detach()), probes.to(features.device, features.dtype)).all()


def _spread(count: int) -> list[int]:
    """Up to PROBES positions in range(count), the first and the last among them."""
    return sorted({i * (count - 1) // (PROBES - 1) for i in range(PROBES)})


def _equal(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors are equal, with NaN equal to NaN."""
    return (x == y) | (x.isnan() & y.isnan())
