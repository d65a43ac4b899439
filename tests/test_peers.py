"""The methods of other papers against plain-Python references written from their descriptions."""

import oracle
import pytest
import torch
from given import WORDS, given, survivors, tokens

from llava_pitome import METHODS, parents
from llava_pitome.merge.plan import make_plan
from llava_pitome.merge.reduce import reduce_tokens
from llava_pitome.methods import _common as picking
from llava_pitome.methods.registry import choose
from llava_pitome.methods.sparsevlm import density_peaks, recycling

CASES = ((2, 1), (5, 3), (12, 6), (13, 12), (20, 5), (30, 22))
EXACT = torch.float64


def chosen(x, remove, method, needs=None, **parameters):
    """A choice and the tokens that it leaves, as lists."""
    needs = given(method, *x.shape, x.dtype) if needs is None else needs
    choice = choose(x, remove, method, **needs, **parameters)
    left, _ = reduce_tokens(x, torch.ones(x.shape[:2]), make_plan(choice.parent, x.shape[1] - remove), choice)
    return choice, left


def close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=EXACT), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length, count", [(1, 1), (7, 7), (7, 3), (24, 5), (10, 1), (577, 100)])
def test_places_are_spread_as_evenly_as_can_be(length, count):
    even = oracle.parts(length, count)
    assert picking.spread(length, count, torch.device("cpu")).tolist() == [oracle.middle(p) for p in even]
    part = picking.part_of(torch.arange(length), length, count)
    assert [part.tolist().count(i) for i in range(count)] == [len(p) for p in even]
    assert {len(p) for p in even} <= {length // count, -(-length // count)}


def test_nothing_is_spread_over_nothing():
    assert picking.spread(0, 0, torch.device("cpu")).tolist() == []
    assert picking.spread(5, 0, torch.device("cpu")).tolist() == []


@pytest.mark.parametrize("depth", [0.0, 0.49, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", [(3, 1), (12, 6), (20, 5)])
def test_tofu_does_what_a_plain_python_oracle_does(count, remove, depth):
    x = tokens(2, count, dtype=EXACT, seed=count)
    choice, left = chosen(x, remove, "tofu", depth=depth)
    for row, parent, weight, found in zip(x.tolist(), choice.parent.tolist(), choice.weight, left):
        assert (parent, weight.tolist()) == oracle.tofu(row, remove, depth)
        kept = [i for i in range(count) if parent[i] == i]
        groups = [[j for j in range(count) if parent[j] == i and weight[j]] for i in kept]
        close(found, [oracle.mlerp([row[j] for j in g], [1] * len(g)) for g in groups])


def test_tofu_drops_before_the_depth_and_stretches_behind_it():
    x = tokens(2, 16, dtype=EXACT)
    early, pruned = chosen(x, 5, "tofu", depth=0.0)
    late, merged = chosen(x, 5, "tofu", depth=0.9)
    assert torch.equal(early.parent, late.parent)
    stays = early.parent == torch.arange(16)
    assert torch.equal(pruned, x[stays].view(2, 11, -1))
    assert not torch.equal(merged, pruned)
    assert (late.weight == 1).all()


@pytest.mark.parametrize("until", [0.0, 0.3, 1.0])
def test_where_tofu_turns_can_be_said(until):
    x = tokens(1, 16)
    for depth in (0.0, 0.29, 0.3, 0.99):
        dropped = (choose(x, 5, "tofu", depth=depth, prune_until=until).weight == 0).sum()
        assert dropped == (5 if depth < until else 0)


def test_tofu_prunes_in_rounds_without_averaging_what_it_drops():
    x = tokens(1, 40, dtype=EXACT)
    first = oracle.tome(x[0].tolist(), 20)
    kept = [i for i in range(40) if first[i] == i]
    second = oracle.tome([x[0, i].tolist() for i in kept], 5)
    expected = [kept[second[kept.index(first[i])]] for i in range(40)]
    choice, left = chosen(x, 25, "tofu")
    assert choice.parent.tolist() == [expected]
    stays = [i for i in range(40) if expected[i] == i]
    assert choice.weight.tolist() == [[int(i in stays) for i in range(40)]]
    assert torch.equal(left[0], x[0, stays])


@pytest.mark.parametrize("count, remove", CASES)
def test_dct_does_what_a_plain_python_oracle_does(count, remove):
    x = tokens(2, count, dtype=EXACT, seed=count)
    choice, left = chosen(x, remove, "dct")
    for row, parent, found in zip(x.tolist(), choice.parent.tolist(), left):
        expected, values = oracle.dct(row, remove)
        assert parent == expected
        close(found, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, EXACT])
@pytest.mark.parametrize("count, remove", [(16, 5), (576, 512), (577, 1)])
def test_dct_keeps_a_constant_sequence(count, remove, dtype):
    x = torch.full((1, count, 2), 3.0, dtype=dtype)
    torch.testing.assert_close(chosen(x, remove, "dct")[1], x[:, remove:], rtol=0, atol=1e-4)


def test_dct_keeps_slow_waves_and_cuts_fast_ones():
    place = (torch.arange(64, dtype=EXACT) + 0.5) / 64
    shorter = (torch.arange(16, dtype=EXACT) + 0.5) / 16
    waves = [torch.cos(torch.pi * k * place) for k in (3, 20)]
    left = chosen(torch.stack(waves, -1)[None], 48, "dct")[1]
    torch.testing.assert_close(left[0, :, 0], torch.cos(torch.pi * 3 * shorter), rtol=0, atol=1e-12)
    torch.testing.assert_close(left[0, :, 1], torch.zeros(16, dtype=EXACT), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prune", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", CASES)
def test_diffrate_does_what_a_plain_python_oracle_does(count, remove, prune):
    x, needs = tokens(2, count, dtype=EXACT, seed=count), given("diffrate", 2, count)
    choice = choose(x, remove, "diffrate", **needs, prune=prune)
    for i, row in enumerate(x.tolist()):
        found = choice.parent[i].tolist(), choice.weight[i].tolist()
        assert found == oracle.diffrate(row, remove, needs["class_attention"][i].tolist(), prune)


def test_diffrate_drops_the_least_attended_half_of_those_who_go():
    attention = torch.tensor([[0.3, 0.1, 0.5, 0.2, 0.4, 0.6]])
    choice = choose(tokens(1, 6), 4, "diffrate", class_attention=attention)
    assert choice.weight.tolist() == [[1, 0, 1, 0, 1, 1]]
    assert (choice.parent[0] == torch.arange(6)).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 7), (7, 1), (4, 4), (3, 5), (5, 3), (2, 9), (6, 6)])
def test_grid_does_what_a_plain_python_oracle_does_for_every_count(rows, columns):
    x = torch.zeros(2, rows * columns, 4)
    for remove in range(1, rows * columns):
        parent = parents(x, remove, "grid", grid=(rows, columns))
        assert parent.tolist() == [oracle.grid(remove, rows, columns)] * 2


@pytest.mark.parametrize("side, cells", [(24, 64), (24, 144), (6, 9), (24, 55), (24, 571), (7, 10)])
def test_the_cells_of_the_grid_are_rectangles_and_nearly_squares(side, cells):
    parent = parents(torch.zeros(1, side * side, 1), side * side - cells, "grid", grid=(side, side))[0]
    assert survivors(parent[None]).tolist() == [cells]
    for survivor in parent.unique().tolist():
        where = (parent == survivor).nonzero().flatten()
        high, wide = (where // side).unique(), (where % side).unique()
        assert len(where) == len(high) * len(wide)
        assert max(len(high), len(wide)) <= 3 * min(len(high), len(wide))
        assert survivor == high[(len(high) - 1) // 2] * side + wide[(len(wide) - 1) // 2]


def test_the_grid_of_four_by_four_is_pooled_two_by_two():
    parent = parents(torch.zeros(1, 16, 1), 12, "grid", grid=(4, 4))
    assert parent.view(4, 4).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [8, 8, 10, 10], [8, 8, 10, 10]]


def test_a_grid_of_another_number_of_patches_raises():
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) is not allowed: rows times columns must be the 16"):
        parents(tokens(), 4, "grid", grid=(3, 5))


@pytest.mark.parametrize("method, name", [("fastv", "received_attention"), ("fastv-last", "last_attention")])
@pytest.mark.parametrize("count, remove", CASES)
def test_fastv_does_what_a_plain_python_oracle_does(method, name, count, remove):
    needs = given(method, 2, count)
    kept = METHODS[method].kept(tokens(2, count), remove, **needs)
    assert kept.tolist() == [oracle.fastv(remove, row) for row in needs[name].tolist()]


@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", CASES)
def test_visionzip_does_what_a_plain_python_oracle_does(count, remove, contextual):
    x, needs = tokens(2, count, dtype=EXACT, seed=count), given("visionzip", 2, count)
    parent = parents(x, remove, "visionzip", **needs, contextual=contextual)
    attention = needs["class_attention"].tolist()
    assert parent.tolist() == [
        oracle.visionzip(r, remove, a, contextual) for r, a in zip(x.tolist(), attention)
    ]


@pytest.mark.parametrize("left, dominant", [(64, 54), (128, 108), (192, 162)])
def test_visionzip_divides_as_the_paper_does(left, dominant):
    x, needs = tokens(1, 576), given("visionzip", 1, 576)
    parent = parents(x, 576 - left, "visionzip", **needs)
    sizes = torch.bincount(parent[0], minlength=576)
    top = needs["class_attention"][0].argsort(descending=True)[:dominant]
    assert (sizes[top] == 1).all()
    assert (sizes > 0).sum() == left
    assert sizes.sum() == 576


@pytest.mark.parametrize("attended, neighbours", [(32 / 144, 32), (0.0, 3), (1.0, 1), (0.5, 0)])
@pytest.mark.parametrize("count, remove", CASES)
def test_prumerge_does_what_a_plain_python_oracle_does(count, remove, attended, neighbours):
    x, needs = tokens(2, count, dtype=EXACT, seed=count), given("prumerge", 2, count)
    choice, left = chosen(x, remove, "prumerge", needs, attended=attended, neighbours=neighbours)
    for i, row in enumerate(x.tolist()):
        attention = needs["class_attention"][i].tolist()
        parent, values = oracle.prumerge(row, remove, attention, attended, neighbours)
        assert choice.parent[i].tolist() == parent
        close(left[i], values)


def test_prumerge_is_made_of_each_survivor_and_its_neighbours():
    mixing = chosen(tokens(2, 40), 30, "prumerge", neighbours=6)[0].mixing
    assert ((mixing > 0).sum(2) == 7).all()


def test_prumerge_has_each_survivor_in_itself_among_equal_tokens_too():
    choice = chosen(torch.zeros(2, 40, 4), 30, "prumerge", neighbours=3)[0]
    stays = choice.parent == torch.arange(40)
    own = choice.mixing[stays.nonzero()[:, 0], torch.arange(10).repeat(2), stays.nonzero()[:, 1]]
    assert (own > 0).all()


@pytest.mark.parametrize("count, remove", CASES)
def test_divprune_does_what_a_plain_python_oracle_does(count, remove):
    x = tokens(3, count, dtype=EXACT, seed=count)
    kept = METHODS["divprune"].kept(x, remove)
    assert kept.tolist() == [oracle.divprune(row, remove) for row in x.tolist()]


def test_divprune_starts_with_the_token_farthest_from_its_nearest():
    angle = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0, 3.1], dtype=EXACT)
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert METHODS["divprune"].kept(x, 5).tolist() == [[3]]
    assert METHODS["divprune"].kept(x, 4).tolist() == [[3, 5]]
    assert METHODS["divprune"].kept(x, 3).tolist() == [[0, 3, 5]]


def test_divprune_takes_equal_tokens_by_index_and_none_twice():
    kept = METHODS["divprune"].kept(torch.ones(2, 9, 4), 4)
    assert kept.tolist() == [[0, 1, 2, 3, 4]] * 2


SPARSE = [{}, {"recycled": 1.0, "peaks": 0.25}, {"recycled": 0.6, "peaks": 0.5, "neighbours": 2},
          {"recycled": 0.0}, {"peaks": 0.0}]  # fmt: skip


@pytest.mark.parametrize("parameters", SPARSE)
@pytest.mark.parametrize("count, remove", CASES)
def test_sparsevlm_does_what_a_plain_python_oracle_does(count, remove, parameters):
    x, needs = tokens(3, count, dtype=EXACT, seed=count), given("sparsevlm", 3, count, dtype=EXACT)
    choice = choose(x, remove, "sparsevlm", **needs, **parameters)
    for i, row in enumerate(x.tolist()):
        score = oracle.ratings(row, *(needs[name][i].tolist() for name in METHODS["sparsevlm"].needs))
        found = choice.parent[i].tolist(), choice.weight[i].tolist()
        assert found == oracle.sparsevlm(row, remove, score, **parameters)


def test_sparsevlm_asks_no_padding():
    x, needs = tokens(3, 20), given("sparsevlm", 3, 20)
    odd = needs | {name: needs[name].clone() for name in ("text", "text_attention")}
    odd["text"][~needs["asks"]] = 100.0
    odd["text_attention"][~needs["asks"]] = torch.nan
    one, other = choose(x, 12, "sparsevlm", **needs), choose(x, 12, "sparsevlm", **odd)
    assert torch.equal(one.parent, other.parent)
    assert torch.equal(one.weight, other.weight)
    assert not needs["asks"].all()


@pytest.mark.parametrize("asks", range(WORDS + 1))
def test_sparsevlm_rates_by_equal_words_and_without_any(asks):
    x, needs = tokens(3, 20), given("sparsevlm", 3, 20)
    needs["text"] = torch.zeros_like(needs["text"])
    needs["asks"] = (torch.arange(WORDS) < asks).expand(3, -1)
    choice = choose(x, 12, "sparsevlm", **needs, recycled=0.0)
    score = needs["text_attention"][:, :asks].sum(1)
    for row, stays in zip(score.tolist(), choice.parent == torch.arange(20)):
        assert stays.nonzero().flatten().tolist() == oracle.fastv(12, row)


def test_sparsevlm_recycles_as_much_as_its_shares_say():
    assert recycling(576, 512, 0.3, 0.1) == (158, 16)  # 48 stay for their scores
    assert recycling(576, 569, 0.3, 0.1)[1] == 3  # never more than half of those left
    assert recycling(576, 575, 0.3, 0.1)[1] == 0
    assert recycling(8, 1, 1.0, 1.0)[1] == 3
    for remove in range(1, 40):
        pooled, groups = recycling(40, remove, 0.3, 0.1)
        assert groups <= pooled <= remove + groups


@pytest.mark.parametrize("count, neighbours", [(1, 1), (4, 2), (9, 20)])
def test_density_peaks_are_those_of_a_plain_python_oracle(count, neighbours):
    x = tokens(2, 9, dtype=EXACT)
    expected = [sorted(oracle.density_peaks(row, count, neighbours)) for row in x.tolist()]
    assert density_peaks(x, count, neighbours).tolist() == expected


@pytest.mark.parametrize(
    "method, name, value",
    [
        ("tofu", "prune_until", 1.5), ("tofu", "prune_until", "half"), ("diffrate", "prune", -0.1),
        ("diffrate", "prune", True), ("visionzip", "contextual", 2), ("prumerge", "attended", float("nan")),
        ("prumerge", "neighbours", -1), ("prumerge", "neighbours", 2.0), ("sparsevlm", "neighbours", 0),
        ("sparsevlm", "recycled", 1.1), ("sparsevlm", "peaks", None),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_raises_with_what_is_allowed(method, name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* is not allowed: it must be a .*(number from)"):
        parents(tokens(), 2, method, **given(method), **{name: value})


@pytest.mark.parametrize("method", [m for m, f in METHODS.items() if "class_attention" in f.needs])
def test_of_equally_attended_tokens_the_first_stay(method):
    needs = {"class_attention": torch.full((1, 16), 0.1)}
    parameters = {"visionzip": {"contextual": 0.0}, "prumerge": {"attended": 1.0}}.get(method, {})
    parent = choose(tokens(1), 12, method, **needs, **parameters).parent
    assert (parent[0, :3] == torch.arange(3)).all()
