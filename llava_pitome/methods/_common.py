"""What several methods find survivors with: the best, the evenly spread, and who is most similar to whom.

Shapes: B images, N tokens, K of them, M survivors, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def best(score: Tensor, count: int) -> Tensor:
    """The positions (B, `count`) of the highest scores (B, N), ascending; of equals the lower index."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def others(chosen: Tensor, count: int) -> Tensor:
    """The positions (B, `count` - K) of `count` that are not among the chosen (B, K), ascending."""
    taken = torch.zeros(len(chosen), count, dtype=torch.uint8, device=chosen.device).scatter(1, chosen, 1)
    return taken.argsort(dim=1, stable=True)[:, : count - chosen.shape[1]]


def part_of(place: Tensor, length: int, parts: int | Tensor) -> Tensor:
    """The part in which each place lies when `length` places are cut into `parts` as even as can be."""
    return ((place + 1) * parts - 1) // length


def middle(part: Tensor, length: int, parts: int | Tensor) -> Tensor:
    """The place in the middle of each part, the lower of two."""
    return (part * length // parts + (part + 1) * length // parts - 1) // 2


def spread(length: int, count: int, device: torch.device) -> Tensor:
    """`count` of `length` places (count,), ascending: the middles of as many even parts."""
    return middle(torch.arange(count, device=device), length, count)


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x (B, N, D) at `index` (B, K): (B, K, D)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def closest(metric: Tensor, among: Tensor) -> Tensor:
    """For each token of (B, N, D) the most similar of those `among` (B, M), ascending: (B, N).

    Those who are among them are their own. Ties go to the lower index.
    """
    unit = F.normalize(metric, dim=-1)
    scores = unit @ tokens_at(unit, among).transpose(1, 2)  # (B, N, M)
    return among.gather(1, scores.argmax(-1)).scatter(1, among, among)


def share(name: str, value: float) -> float:
    """The value of a parameter that is a share.

    Raises:
        ValueError: it is no number from 0 to 1.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a number from 0 to 1")
    return value


def whole(name: str, value: int, least: int) -> int:
    """The value of a parameter that counts something.

    Raises:
        ValueError: it is no whole number from `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number from {least}")
    return value
