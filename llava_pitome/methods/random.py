"""Random merging, a control: the tokens to remove are drawn randomly."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods.registry import Method, parameter, register_method
from llava_pitome.plain_values import plain


@register_method("random")
@dataclass(frozen=True)
class Random(Method):
    """Randomly drawn tokens merge into the most similar kept token.

    The draw is the same for every image, so that results do not depend on the batch. It depends on `seed` and
    `depth`, so that layers differ.
    """

    pairs_tokens = True

    seed: int = parameter(0, "seed of the draw", least=0)

    def merge(self, metric: Tensor, remove: int, depth: float = 0.0) -> MergeResult:
        """Returns the draw."""
        count = plain(metric.shape[1])
        seed = (self.seed * 1000 + round(depth * 999)) * 100_000 + count
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randperm(count, generator=generator, device="cpu")
        if torch.jit.is_tracing():  # which would record another draw, without the generator
            drawn = torch.tensor(drawn.tolist(), device="cpu")
        drawn = drawn.to(metric.device)
        gone, kept = drawn[:remove].sort().values, drawn[remove:].sort().values
        unit = F.normalize(metric, dim=-1)
        closest = kept[(unit[:, gone] @ unit[:, kept].transpose(1, 2)).argmax(-1)]  # (B, remove)
        parent = torch.arange(count, device=metric.device).repeat(metric.shape[0], 1)
        return MergeResult(parent.scatter(1, gone.expand(metric.shape[0], -1), closest))
