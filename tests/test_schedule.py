import random
from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
import torch

from llava_pitome.token_schedule import (
    LIMIT,
    common_ratio,
    kept_by_ratio,
    kept_tokens,
    lengths,
    lengths_for,
    tokens_between,
)

LLAVA = (True,) * 23  # LLaVA-1.5's layers that merge


def exact(tokens, ratio):
    """Returns how many tokens a share keeps, by the formula in exact fractions."""
    return max(tokens - floor(tokens * (1 - Fraction(str(ratio)))), 1)


def shares():
    """Returns shares of every size, those with few decimals among them."""
    draw = random.Random(0)
    yield from (1, 1.0, 0.95, 0.5, 1 / 3, 2 / 3, 13 / 24, 0.1 + 0.2, 1e-5, 1e-9, 1e-10, 1e-300, 5e-324)
    yield from (1 - 2**-53, 1 - 1e-10, 1 - 2**-31, 2**-31, 0.9999999995343387)
    yield from (i / 1000 for i in range(1, 1000))
    yield from (draw.random() for _ in range(1000))
    yield from (10 ** -draw.uniform(0, 20) for _ in range(300))
    yield from (1 - 10 ** -draw.uniform(0, 15.9) for _ in range(300))


def test_a_share_of_any_count_is_exact():
    draw = random.Random(1)
    for ratio in shares():
        drawn = (round(2 ** draw.uniform(0, 30.99)) for _ in range(20))
        for tokens in (1, 2, 3, 7, 10, 36, 49, 196, 576, 577, 729, 2304, LIMIT - 1, LIMIT, *drawn):
            assert kept_by_ratio(tokens, ratio) == exact(tokens, ratio), (tokens, ratio)


@pytest.mark.parametrize("dynamic", [None, True])
def test_shares_of_a_symbolic_count_are_exact(dynamic):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    def shortened(x, ratio):
        return x[:, : kept_by_ratio(x.shape[1], ratio)]

    torch.compiler.reset()
    compiled = torch.compile(shortened, backend=backend, dynamic=dynamic, fullgraph=True)
    for tokens in (36, 40, 57, 576, 1000):
        for ratio in (0.9, 1 / 3, 1e-9):
            assert compiled(torch.zeros(2, tokens), ratio).shape[1] == exact(tokens, ratio)
    assert len(graphs) <= (6 if dynamic is None else 3)  # none for another count, once that is symbolic
    torch.compiler.reset()


@pytest.mark.parametrize("ratio", [0.9, 1 / 3, 1e-9])
def test_shares_of_a_symbolic_count_export(ratio):
    class Kept(torch.nn.Module):
        def forward(self, x):
            return x.sum() + kept_by_ratio(x.shape[1], ratio)

    tokens = {1: torch.export.Dim("tokens", min=2, max=4096)}
    program = torch.export.export(Kept(), (torch.zeros(2, 36),), dynamic_shapes=(tokens,))
    for count in (36, 57, 576):
        assert program.module()(torch.zeros(2, count)) == exact(count, ratio)


@pytest.mark.parametrize(
    "patches, ratios, expected",
    [
        (576, (0.975,) * 23, 330), (576, (0.95,) * 23, 183), (576, (0.925,) * 23, 101),
        (576, (0.9,) * 23, 54), (576, (0.875,) * 23, 30), (576, (0.85,) * 23, 17),  # known of LLaVA-1.5
        (576, (1.0,) * 23, 576), (576, (1,) * 23, 576), (36, (), 36),
        (5, (1e-7,) * 9, 1), (5, (0.01,) * 9, 1), (5, (0.3,) * 9, 1),  # never 0
        *((n, (0.9,), n * 9 // 10) for n in (10, 20, 30, 70, 100, 440, 570)),  # shares are exact decimals
    ],
)  # fmt: skip
def test_lengths_end_at_the_known_count(patches, ratios, expected):
    counts = lengths(patches, ratios)
    assert (len(counts), counts[0], counts[-1]) == (len(ratios) + 1, patches, expected)


def test_a_layer_removes_the_floor_of_the_rest_of_its_share():
    assert lengths(10, (0.9, 0.5, 1.0, 0.95)) == (10, 9, 5, 5, 5)


@pytest.mark.parametrize("patches, layers", [(1, 1), (2, 3), (17, 1), (36, 7), (49, 2), (196, 11), (576, 23)])
def test_every_token_count_is_reached_exactly_and_lengths_never_rise(patches, layers):
    for tokens in range(1, patches + 1, 1 if patches < 500 else 19):
        counts = lengths_for(patches, (True,) * layers, tokens)
        assert (len(counts), counts[0], counts[-1]) == (layers + 1, patches, tokens)
        assert all(a >= b >= 1 for a, b in pairwise(counts))


@pytest.mark.parametrize("tokens, ratio", [(192, 0.952), (128, 0.935), (64, 0.905), (32, 0.877)])
def test_the_common_ratio_is_the_published_one(tokens, ratio):
    assert common_ratio(576, 23, tokens) == pytest.approx(ratio, abs=2e-3)


def test_early_layers_keep_the_common_ratio():
    common = lengths(576, (common_ratio(576, 23, 64),) * 23)
    assert common[-1] <= 64
    assert lengths_for(576, LLAVA, 64) == tuple(max(count, 64) for count in common)


def test_all_patches_need_no_layer():
    assert lengths_for(36, (), 36) == (36,)


@pytest.mark.parametrize("share, expected", [(0.0, 64), (0.5, 192), (1.0, 576)])
def test_two_merges_divide_a_reduction_by_its_logarithm(share, expected):
    assert tokens_between(576, 64, share) == expected


@pytest.mark.parametrize("amount, expected", [(0.5, 18), (20, 20), (36, 36), (1e-9, 1)])
def test_an_amount_is_a_share_or_a_count(amount, expected):
    assert kept_tokens(36, amount, "prefix") == expected


@pytest.mark.parametrize(
    "call, message",
    [
        *((lambda n=n: lengths_for(36, LLAVA, n), rf"tokens={n} .*1 to 36") for n in (-1, 0, 37, 577)),
        (lambda: lengths_for(36, (), 20), "tokens=20 needs a layer"),
        (lambda: kept_tokens(36, 37, "prefix"), "prefix=37 does not fit: 36 tokens remain, allowed is 1 to"),
    ],
)
def test_counts_that_do_not_fit_raise_with_the_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
