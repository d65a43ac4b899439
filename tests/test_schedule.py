from itertools import pairwise

import pytest

from llava_pitome.token_schedule import common_ratio, kept_tokens, lengths, lengths_for, tokens_between

LLAVA = (True,) * 23  # LLaVA-1.5's layers that merge


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
