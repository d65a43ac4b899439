"""What reached the language model: the pictures' features, and what is known of each of their tokens.

Between the projector and the language model features are handed about by others: generate repeats them for
beams, people keep them for a second question. So they are found again by what they hold, and a prompt whose
features are not those that were encoded last is an error instead of an answer with another picture's sizes.
Where prompts come without ids, as those of the original package do, they are also found in these that way.
Shapes: P pictures that were encoded, I images in B prompts of T tokens, n tokens an image, D channels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.merge.plan import MergePlan

PROBES = 4  # tokens of an image that are compared
CHANNELS = 8  # of them that are compared at every place of a prompt, before the others are at a few


class ImageFeatures:
    """A hook on the projector, behind any that merges there."""

    def __init__(
        self,
        projector: nn.Module,
        front: int,
        sizes: Callable[[], Tensor | None],
        plans: Callable[[], Sequence[MergePlan]],
    ):
        """Prepares the hook.

        Args:
            projector: (P, front + n, channels) to (P, front + n, D).
            front: class tokens among the features, which are not looked at.
            sizes: the patches that each token (P, n) stands for; None: one each.
            plans: the merges that led there.
        """
        self.projector, self.front, self._sizes_now, self._plans_now = projector, front, sizes, plans
        self._handle: RemovableHandle | None = None
        self._forget()

    def install(self) -> None:
        """Registers the hook."""
        self._handle = self.projector.register_forward_hook(self._note)

    def remove(self) -> None:
        """Takes it off and forgets."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._forget()

    def _forget(self) -> None:
        self._features: Tensor | None = None
        self._count = 0
        self._sizes: Tensor | None = None
        self._places: Tensor | None = None

    def _note(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        plans = self._plans_now()
        self._features = _probed(output.detach()[:, self.front :])
        self._count = output.shape[1]
        self._sizes = self._sizes_now()
        self._places = None
        if plans:
            self._places = plans[0].kept
            for plan in plans[1:]:
                self._places = self._places.gather(1, plan.kept)

    @property
    def merged(self) -> bool:
        """Whether the tokens that arrived last are fewer than the patches were."""
        return self._places is not None

    def found(self, hidden: Tensor) -> tuple[Tensor, int] | None:
        """Where prompts (B, T, D) hold pictures that were encoded last: True (B, T), and tokens an image.

        None where nothing was encoded yet.

        Raises:
            ValueError: a picture is there in part only.
        """
        if self._features is None:
            return None
        is_image = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        hidden, known = hidden.detach(), self._features.to(hidden.device)
        firsts = _equal(hidden[:, None, :, :CHANNELS], known[:, None, 0, :CHANNELS]).all(3)  # (B, P, T)
        row, picture, place = firsts.nonzero(as_tuple=True)
        here = _equal(hidden[row, place], known[picture, 0]).all(1)
        row, picture, place = row[here], picture[here], place[here]
        fits = (place >= self.front) & (place - self.front + self._count <= hidden.shape[1])
        starts = row[fits], picture[fits], place[fits]
        for k, shift in enumerate(_spread(self._count - self.front)):
            here = _equal(hidden[starts[0], starts[2] + shift], known[starts[1], k]).all(1)
            starts = tuple(x[here] for x in starts)
        for i in range(self._count):
            is_image[starts[0], starts[2] - self.front + i] = True
        if not bool(is_image[row, place].all()):
            raise ValueError(
                "a prompt holds the beginning of an image only, as where it is longer than "
                "tokenizer_model_max_length: tokens merge image by image"
            )
        return is_image, self._count

    def of(self, hidden: Tensor, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The patches (I, n) that each token of some images stands for, and its place in their raster.

        Args:
            hidden: (B, T, D) the prompts.
            images: (I, n) where the images' tokens are, counted over all prompts.

        Returns:
            Two times None where all patches arrived.

        Raises:
            RuntimeError: an image's features are not those of a picture that was encoded last.
        """
        if self._places is None:
            return None, None
        which = self._which(hidden.detach().flatten(0, 1)[_probed(images)], images.shape[1])
        return self._sizes[which], self._places[which]

    def _which(self, probed: Tensor, count: int) -> Tensor:
        """The picture (I,) that each image's probed features (I, PROBES, D) are of."""
        same = torch.zeros(len(probed), 1, dtype=torch.bool)
        if self._places.shape[1] == count:
            known = self._features.to(probed.device, probed.dtype)
            same = _equal(probed.unsqueeze(1), known.unsqueeze(0)).flatten(2).all(2)  # (I, P)
        if not bool(same.any(1).all()):
            raise RuntimeError(
                "an image's features in this prompt are not of the pictures that were encoded last, so it "
                "is unknown what their tokens stand for; encode the pictures of a prompt right before it"
            )
        return same.to(torch.uint8).argmax(1)


def _probed(x: Tensor) -> Tensor:
    """Evenly spread tokens of each image: (I, n, ...) to (I, PROBES or less, ...)."""
    return x[:, _spread(x.shape[1])]


def _spread(count: int) -> list[int]:
    """Up to PROBES places in range(count), the first and the last among them."""
    return sorted({i * (count - 1) // (PROBES - 1) for i in range(PROBES)})


def _equal(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors are the same, NaN like NaN."""
    return (x == y) | (x.isnan() & y.isnan())
