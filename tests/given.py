"""Random inputs of methods: another draw for every image, the same in every run."""

import torch

from llava_pitome import METHODS
from llava_pitome.methods.registry import choose

WORDS = 6  # text tokens, of which some are padding


def tokens(batch=3, count=16, channels=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64).to(dtype)


def sizes(batch, count, seed=0):
    return torch.randint(1, 9, (batch, count), generator=torch.Generator().manual_seed(seed)).float()


def given(method, batch=3, count=16, channels=8, dtype=torch.float32, seed=0):
    """Returns the inputs that a method needs besides the metric."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rows = max(n for n in range(1, count + 1) if count % n == 0 and n * n <= count)
    made = {
        "sizes": (draw(batch, count) * 8).ceil().float(),
        "class_attention": draw(batch, count),
        "received_attention": draw(batch, count),
        "last_attention": draw(batch, count),
        "text_attention": draw(batch, WORDS, count),
        "text": (draw(batch, WORDS, channels) - 0.5).to(dtype),
        "text_mask": torch.arange(WORDS) >= torch.arange(batch)[:, None] % 3,
        "grid": (rows, count // rows),
    }
    return {name: made[name] for name in METHODS[method].needs}


def at(inputs, index):
    """Returns the inputs of some images."""
    return mapped(inputs, lambda value: value[index])


def mapped(inputs, change):
    """Returns the inputs with each tensor changed."""
    return {name: value if isinstance(value, tuple) else change(value) for name, value in inputs.items()}


def decide(x, remove, method, **parameters):
    """Returns a method's decision on tokens, with made-up inputs."""
    return choose(x, remove, method, **given(method, *x.shape, x.dtype), **parameters)


def kept(parent):
    """Returns which tokens (B, N) are kept."""
    return parent == torch.arange(parent.shape[1])


PRUNING = [m for m in METHODS if decide(tokens(1), 1, m).prunes]
MIXING = [m for m in METHODS if decide(tokens(1), 1, m).mixing is not None]
