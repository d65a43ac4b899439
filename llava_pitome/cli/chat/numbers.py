"""What an answer cost: tokens, times, memory."""

import resource
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch


class Numbers(NamedTuple):
    """What one answer cost.

    Attributes:
        image_tokens: that reached the language model, of all pictures in the prompt.
        patches: that they were made of.
        prompt_tokens: of the whole prompt, image tokens among them.
        answer_tokens: that were generated.
        first_token: seconds until the first of them.
        tokens_per_second: of those after the first; None for an answer of one.
        memory: the most bytes the process held so far (of the GPU, where one is used).
    """

    image_tokens: int
    patches: int
    prompt_tokens: int
    answer_tokens: int
    first_token: float
    tokens_per_second: float | None
    memory: int

    def line(self) -> str:
        """All of it in one line for people."""
        speed = f"{self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else "1 token"
        return (
            f"{self.image_tokens} image tokens of {self.patches} · first token {self.first_token:.2f} s · "
            f"{speed} · {self.memory / 2**30:.2f} GB"
        )


def speed(times: Sequence[float]) -> float | None:
    """Tokens a second after the first, from the seconds at which each came; None where there is one."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None


def memory(device: torch.device) -> int:
    """The most bytes held so far: of the process on CPUs, of the allocator on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
