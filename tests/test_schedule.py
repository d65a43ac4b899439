from itertools import pairwise

import pytest

from llava_pitome.token_schedule import lengths, lengths_for, solve


@pytest.mark.parametrize(
    "keep, tokens", [(0.975, 330), (0.95, 183), (0.925, 101), (0.9, 54), (0.875, 30), (0.85, 17)]
)
def test_llava_1_5_keeps_the_known_counts(keep, tokens):
    counts = lengths(576, (keep,) * 23)
    assert len(counts) == 24
    assert counts[0] == 576
    assert counts[-1] == tokens


def test_a_layer_removes_the_floor_of_what_the_share_leaves_out():
    assert lengths(10, (0.9, 0.5, 1.0, 0.95)) == (10, 9, 5, 5, 5)


@pytest.mark.parametrize("patches", [10, 20, 30, 70, 100, 440, 570])
def test_shares_are_read_as_decimals_without_rounding_errors(patches):
    assert lengths(patches, (0.9,))[-1] == patches * 9 // 10


def test_a_share_of_one_keeps_everything():
    assert lengths(576, (1.0,) * 23) == (576,) * 24
    assert lengths(576, (1,) * 23) == (576,) * 24


def test_no_layers_leave_the_patches_alone():
    assert lengths(36, ()) == (36,)


@pytest.mark.parametrize("keep", [1e-7, 0.01, 0.3])
def test_at_least_one_token_is_always_left(keep):
    assert lengths(5, (keep,) * 9)[-1] == 1


@pytest.mark.parametrize("patches, layers", [(1, 1), (2, 3), (17, 1), (36, 7), (49, 2), (196, 11)])
def test_every_token_count_is_hit_exactly_and_lengths_never_rise(patches, layers):
    for tokens in range(1, patches + 1):
        counts = lengths_for(patches, (True,) * layers, tokens)
        assert len(counts) == layers + 1
        assert (counts[0], counts[-1]) == (patches, tokens)
        assert all(a >= b >= 1 for a, b in pairwise(counts))


@pytest.mark.parametrize("tokens", [1, 17, 55, 64, 128, 192, 575, 576])
def test_llava_1_5_hits_the_budgets_of_the_field(tokens):
    assert lengths_for(576, (True,) * 23, tokens)[-1] == tokens


@pytest.mark.parametrize("tokens, keep", [(192, 0.952), (128, 0.935), (64, 0.905), (32, 0.877)])
def test_the_solved_share_is_the_published_one(tokens, keep):
    assert solve(576, 23, tokens) == pytest.approx(keep, abs=2e-3)


def test_early_layers_keep_the_common_share_of_a_budget():
    counts, common = lengths_for(576, (True,) * 23, 64), lengths(576, (solve(576, 23, 64),) * 23)
    assert common[-1] <= 64
    assert [max(c, 64) for c in common] == list(counts)


def test_all_patches_need_no_layer():
    assert lengths_for(36, (), 36) == (36,)


@pytest.mark.parametrize("tokens", [-1, 0, 37, 577])
def test_tokens_that_do_not_fit_raise_with_the_value_and_the_range(tokens):
    with pytest.raises(ValueError, match=rf"tokens={tokens} .*1 to 36"):
        lengths_for(36, (True,) * 7, tokens)


def test_fewer_tokens_without_a_layer_to_merge_in_raise():
    with pytest.raises(ValueError, match="tokens=20"):
        lengths_for(36, (), 20)
