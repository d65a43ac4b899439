"""The features that reached the language model, and what is known of each of their tokens.

Between the projector and the language model features are passed on by others: generate repeats them for
beams, users keep them for a second question. So they are recognised by their values, and a prompt whose
features are not those that were encoded last is an error instead of an answer with the sizes of another
image. Where prompts come without ids, as those of the original package do, images are also located in them
that way.
Shapes: P images that were encoded, I images in B prompts of T tokens, n tokens an image, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_pitome.merge.plan import MergePlan

PROBES = 4  # tokens of an image that are compared
CHANNELS = 8  # channels that are compared at every position of a prompt, before the others are at a few


class ImageFeatures:
    """A record of the features of the images that were encoded last."""

    def __init__(self, num_prefix_tokens: int):
        """Starts without images.

        Args:
            num_prefix_tokens: prefix tokens among the features, which are not compared.
        """
        self.num_prefix_tokens = num_prefix_tokens
        self.clear()

    def clear(self) -> None:
        """Drops the images."""
        self._features: Tensor | None = None
        self._count = 0
        self._sizes: Tensor | None = None
        self._kept: Tensor | None = None

    def record(self, features: Tensor, sizes: Tensor | None, plans: Sequence[MergePlan]) -> None:
        """Records images that were encoded.

        Args:
            features: (P, prefix + n, D) as they leave the projector.
            sizes: (P, n) patches that each token stands for; None: one each.
            plans: the merges that led there.
        """
        self._features = _probed(features.detach()[:, self.num_prefix_tokens :])
        self._count = features.shape[1]
        self._sizes = sizes
        self._kept = None
        if plans:
            self._kept = plans[0].kept
            for plan in plans[1:]:
                self._kept = self._kept.gather(1, plan.kept)

    def locate(self, hidden: Tensor) -> tuple[Tensor, int] | None:
        """Where prompts (B, T, D) hold images that were encoded last: True (B, T), and tokens per image.

        None where nothing was encoded yet.

        Raises:
            ValueError: a prompt holds a part of an image only.
        """
        if self._features is None:
            return None
        prefix, length = self.num_prefix_tokens, hidden.shape[1]
        is_image = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        hidden, known = hidden.detach(), self._features.to(hidden.device)
        firsts = _equal(hidden[:, None, :, :CHANNELS], known[:, None, 0, :CHANNELS]).all(3)  # (B, P, T)
        row, image, position = firsts.nonzero(as_tuple=True)
        equal = _equal(hidden[row, position], known[image, 0]).all(1)
        row, image, position = row[equal], image[equal], position[equal]
        fits = (position >= prefix) & (position - prefix + self._count <= length)
        starts = row[fits], image[fits], position[fits]
        for k, offset in enumerate(_spread(self._count - prefix)):
            equal = _equal(hidden[starts[0], starts[2] + offset], known[starts[1], k]).all(1)
            starts = tuple(x[equal] for x in starts)
        for i in range(self._count):
            is_image[starts[0], starts[2] - prefix + i] = True
        if not bool(is_image[row, position].all()):
            raise ValueError(
                "a prompt holds the beginning of an image only, as where it is longer than "
                "tokenizer_model_max_length: tokens merge image by image"
            )
        return is_image, self._count

    def lookup(self, hidden: Tensor, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The patches (I, n) that each token of some images stands for, and its position in their raster.

        Args:
            hidden: (B, T, D) the prompts.
            images: (I, n) positions of the images' tokens, counted over all prompts.

        Returns:
            None, None where no patches merged.

        Raises:
            RuntimeError: an image's features are not those of an image that was encoded last.
        """
        if self._kept is None:
            return None, None
        which = self._which(hidden.detach().flatten(0, 1)[_probed(images)], images.shape[1])
        return self._sizes[which], self._kept[which]

    def _which(self, probed: Tensor, count: int) -> Tensor:
        """The index (I,) of the encoded image that each image's probed features (I, PROBES, D) belong to."""
        same = torch.zeros(len(probed), 1, dtype=torch.bool, device=probed.device)
        if self._kept.shape[1] == count:
            known = self._features.to(probed.device, probed.dtype)
            same = _equal(probed.unsqueeze(1), known.unsqueeze(0)).flatten(2).all(2)  # (I, P)
        if not bool(same.any(1).all()):
            raise RuntimeError(
                "the features of an image in this prompt are not those of the images that were encoded last, "
                "so it is unknown what their tokens stand for; encode the images of a prompt right before it"
            )
        return same.to(torch.uint8).argmax(1)


def _probed(x: Tensor) -> Tensor:
    """Evenly spread tokens of each image: (I, n, ...) to (I, PROBES or less, ...)."""
    return x[:, _spread(x.shape[1])]


def _spread(count: int) -> list[int]:
    """Up to PROBES positions in range(count), the first and the last among them."""
    return sorted({i * (count - 1) // (PROBES - 1) for i in range(PROBES)})


def _equal(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors are equal, with NaN equal to NaN."""
    return (x == y) | (x.isnan() & y.isnan())
