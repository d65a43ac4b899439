"""One forward pass through a language model in which tokens merge: what is known in every stretch of layers.

Stretch s are the layers behind s merges; all about it is in slot s of a list, and is written again with
the same values where a layer runs again (gradient checkpointing).
Shapes: B prompts, T tokens, P tokens in the cache, I images over all prompts, n tokens an image.
"""

from typing import Any

import torch
from torch import Tensor

from llava_pitome.hooks import kv_cache as pasts
from llava_pitome.hooks import prompt_layout as prompts
from llava_pitome.hooks.kv_cache import CacheState, SegmentCache
from llava_pitome.hooks.merge_step import ANOTHER_PASS, recomputing
from llava_pitome.hooks.prompt_layout import PromptLayout
from llava_pitome.merge.plan import gather_tokens
from llava_pitome.models.parts import TokenState


class ForwardState:
    """A pass, from its beginning to its end.

    Attributes:
        prompts: the batch in each stretch; None in a pass without images.
        slots: the sizes (I, n) of the images' tokens there.
        past: what the caches of each stretch hold from passes before; None where nothing has ever merged.
    """

    def __init__(self, stretches: int, length: int, memory: CacheState | None):
        """Begins.

        Args:
            stretches: merges that the config asks for, and one.
            length: T in front of the first layer.
            memory: what the cache remembers of the passes before.
        """
        self.prompts: list[PromptLayout | None] = [None] * stretches
        self.slots: list[TokenState | None] = [None] * stretches
        self.past = None if memory is None else memory.past
        self._open = 0 if memory is None else memory.open + length
        self._before = self._shift = None if memory is None else memory.shift
        self._places: Tensor | None = None
        self._patches = 0
        self._now: list[SegmentCache | None] = [None] * stretches
        self._masks: list[Tensor | None] = [None] * stretches
        self._angles: list[dict[str, Any] | None] = [None] * stretches
        self._turns: Tensor | None = None  # the model hands the same to every layer of a pass

    @property
    def has_images(self) -> bool:
        """Whether this pass brings images."""
        return self.prompts[0] is not None

    def begin(self, prompt: PromptLayout, sizes: Tensor | None, before: SegmentCache, weighed: bool) -> None:
        """Takes the images in.

        Args:
            prompt: where they are.
            sizes: (I, n) patches that their tokens stand for; None: one each.
            before: what is in the cache, if nothing is remembered.
            weighed: log sizes are to be added to the scores of their tokens.
        """
        self._open = prompts.behind(prompt)
        given = torch.ones(prompt.images.shape) if sizes is None else sizes
        slot = TokenState(given.to(prompt.images.device))
        if self.past is None:
            self.past = (before,) * len(self.prompts)
        self.enter(0, prompt, slot, weighed and sizes is not None)

    def go_on(self, length: int, real: Tensor | None) -> None:
        """Takes `length` further tokens without images in, padding where `real` (B, T) is False."""
        if self.past is not None:
            self._now = [past.grown(length, real, None) for past in self.past]

    def place(self, places: Tensor, patches: int) -> None:
        """Gives the images' tokens the positions of their patches: `places` (I, n) of `patches`."""
        prompt = self.prompts[0]
        self._places, self._patches = places, patches
        missing = patches - prompt.images.shape[1]
        more = missing * torch.tensor(prompt.counts, device=prompt.images.device).unsqueeze(1)
        self._shift = more if self._before is None else self._before + more

    def enter(self, s: int, prompt: PromptLayout, slot: TokenState, weighed: bool) -> None:
        """What stretch s is given: the prompts as they are there, and their images' sizes."""
        self.prompts[s], self.slots[s] = prompt, slot
        bias = _log_sizes(prompt, slot) if weighed else None
        self._now[s] = self.past[s].grown(prompt.shape[1], prompt.real, bias)
        self._masks[s] = self._angles[s] = None

    def turned(self, positions: Tensor) -> Tensor:
        """The positions (B or 1, T) of this pass's tokens, from those that were counted through."""
        if self._before is not None:
            positions = positions + self._before.to(positions.device)
        if self._places is not None:
            positions = prompts.unpacked(self.prompts[0], positions, self._places, self._patches)
        return positions

    def mask(self, s: int, given: Tensor | None, like: Tensor, plain: bool) -> Tensor | None:
        """The attention mask in stretch s, worked out once.

        Args:
            s: which stretch.
            given: the model's own, which fits the first.
            like: the hidden state (B, T, D) there.
            plain: whether the kernel is causal by itself without a mask.
        """
        now = self._now[s]
        if s == 0 and now.bias is None:
            return given
        if self._masks[s] is None:
            count, dtype, device = like.shape[1], like.dtype, like.device
            if s == 0:
                self._masks[s] = pasts.biased(given, now, count, dtype, device)
            else:
                self._masks[s] = pasts.mask(now, count, plain, dtype, device)
        mask = self._masks[s]
        return None if mask is None else pasts.cast(mask, like)

    def angles(self, s: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Where tokens stand in stretch s: each at the position that it had in front of the first layer."""
        prompt = self.prompts[s]
        if prompt is None or prompt.origin is None:
            return {}
        cos, sin = kwargs["position_embeddings"]
        known = self._angles[s]
        if known is None or known["position_embeddings"][0].device != cos.device:
            origin = prompt.origin.to(cos.device)
            both = tuple(
                gather_tokens(x.expand(len(origin), -1, -1).contiguous(), origin) for x in (cos, sin)
            )
            known = {"position_embeddings": both}
            if (ids := kwargs.get("position_ids")) is not None:
                known["position_ids"] = ids.expand(len(origin), -1).gather(1, origin.to(ids.device))
            self._angles[s] = known
        return known

    def check(self, s: int, hidden: Tensor, turns: Tensor | None = None) -> None:
        """Raises RuntimeError where gradient checkpointing runs a layer of an earlier pass again.

        Args:
            s: which stretch.
            hidden: (B, T, D) what the layer is given.
            turns: the cosines that the model gave it.
        """
        if turns is not None and self._turns is None:
            self._turns = turns
        if turns is not None and turns is not self._turns and recomputing():
            raise RuntimeError(ANOTHER_PASS)
        prompt = self.prompts[s]
        if prompt is not None and prompt.shape != hidden.shape[:2]:
            raise RuntimeError(ANOTHER_PASS)

    def end(self, first_layers: tuple[int, ...], way: tuple[str, bool]) -> CacheState:
        """What the cache has to remember."""
        return CacheState(first_layers, way, tuple(self._now), self._open, self._shift)

    def forget_masks(self) -> None:
        """Drops what is only needed while layers run."""
        self._masks = [None] * len(self._masks)
        self._angles = [None] * len(self._angles)


def _log_sizes(prompt: PromptLayout, slot: TokenState) -> Tensor:
    """Log sizes (B, T) of the images' tokens, 0 for text."""
    bias = torch.zeros(prompt.shape, device=prompt.images.device)
    bias.view(-1)[prompt.images.flatten()] = slot.sizes.log().flatten()
    return bias
