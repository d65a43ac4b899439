"""What methods are given, made up: another draw for every image, the same in every run."""

import torch

from llava_pitome import METHODS

WORDS = 6  # text tokens, of which some are padding


def tokens(batch=3, count=16, channels=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, channels, generator=generator, dtype=torch.float64).to(dtype)


def grid(count):
    """The rows and columns nearest to a square that hold so many patches."""
    rows = max(n for n in range(1, count + 1) if count % n == 0 and n * n <= count)
    return rows, count // rows


def given(method, batch=3, count=16, channels=8, dtype=torch.float32, seed=0):
    """A dict of what the method needs beside the metric."""
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    made = {
        "size": (draw(batch, count) * 8).ceil().float(),
        "class_attention": draw(batch, count),
        "received_attention": draw(batch, count),
        "last_attention": draw(batch, count),
        "text_attention": draw(batch, WORDS, count),
        "text": (draw(batch, WORDS, channels) - 0.5).to(dtype),
        "asks": torch.arange(WORDS) >= torch.arange(batch)[:, None] % 3,
        "grid": grid(count),
    }
    return {name: made[name] for name in METHODS[method].needs}


def at(found, index):
    """The same of some images."""
    return {name: value if isinstance(value, tuple) else value[index] for name, value in found.items()}


def survivors(parent):
    return (parent == torch.arange(parent.shape[1])).sum(1)
