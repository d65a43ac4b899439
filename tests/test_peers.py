"""The methods of other papers against plain-Python references written from their descriptions."""

import oracle
import pytest
import torch
from given import WORDS, decide, given, kept, tokens

from llava_pitome import METHODS, parents
from llava_pitome.merge.plan import make_plan
from llava_pitome.merge.reduce import reduce_tokens
from llava_pitome.methods._common import evenly_spaced, segment_of
from llava_pitome.methods.registry import choose
from llava_pitome.methods.sparsevlm import density_peaks, recycled_counts

CASES = ((2, 1), (5, 3), (12, 6), (13, 12), (20, 5), (30, 22))
EXACT = torch.float64


def reduced(x, result, remove):
    """Returns the tokens that a decision makes of x."""
    plan = make_plan(result.parent, x.shape[1] - remove)
    return reduce_tokens(x, torch.ones(x.shape[:2]), plan, result)[0]


def assert_close(found, expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=EXACT), rtol=1e-9, atol=1e-10)


def positions(parent):
    """Returns the positions of the kept tokens of each image, as lists."""
    return [row.nonzero().flatten().tolist() for row in kept(parent)]


@pytest.mark.parametrize("length, count", [(0, 0), (5, 0), (1, 1), (7, 7), (7, 3), (24, 5), (577, 100)])
def test_positions_are_spaced_as_evenly_as_possible(length, count):
    even = oracle.parts(length, count)[:count]
    assert evenly_spaced(length, count, torch.device("cpu")).tolist() == [oracle.middle(p) for p in even]
    segment = segment_of(torch.arange(length), length, count).tolist() if count else []
    assert [segment.count(i) for i in range(count)] == [len(p) for p in even]
    assert {len(p) for p in even} <= {length // max(count, 1), -(-length // max(count, 1))}


# ToFu


@pytest.mark.parametrize("depth", [0.0, 0.49, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", [(3, 1), (12, 6), (20, 5)])
def test_tofu_equals_the_oracle(count, remove, depth):
    x = tokens(2, count, dtype=EXACT, seed=count)
    result = decide(x, remove, "tofu", depth=depth)
    for i, row in enumerate(x.tolist()):
        parent, weight = oracle.tofu(row, remove, depth)
        assert (result.parent[i].tolist(), result.weight[i].tolist()) == (parent, weight)
        groups = [[j for j in range(count) if parent[j] == k and weight[j]] for k in sorted(set(parent))]
        expected = [oracle.mlerp([row[j] for j in group], [1] * len(group)) for group in groups]
        assert_close(reduced(x, result, remove)[i], expected)


@pytest.mark.parametrize("until", [0.0, 0.3, 1.0])
def test_tofu_drops_before_the_depth_that_is_set(until):
    for depth in (0.0, 0.29, 0.3, 0.99):
        dropped = (decide(tokens(1), 5, "tofu", depth=depth, prune_until=until).weight == 0).sum()
        assert dropped == (5 if depth < until else 0)


def test_tofu_prunes_in_rounds_without_averaging_what_it_drops():
    x = tokens(1, 40, dtype=EXACT)
    first = oracle.tome(x[0].tolist(), 20)
    stays = [i for i in range(40) if first[i] == i]
    second = oracle.tome([x[0, i].tolist() for i in stays], 5)
    expected = [stays[second[stays.index(first[i])]] for i in range(40)]
    result = decide(x, 25, "tofu")
    assert result.parent.tolist() == [expected]
    assert torch.equal(result.weight, kept(result.parent).float())
    assert torch.equal(reduced(x, result, 25)[0], x[0, sorted(set(expected))])


# DCT


@pytest.mark.parametrize("count, remove", CASES)
def test_dct_equals_the_oracle(count, remove):
    x = tokens(2, count, dtype=EXACT, seed=count)
    result = decide(x, remove, "dct")
    for row, parent, found in zip(x.tolist(), result.parent.tolist(), reduced(x, result, remove)):
        expected, values = oracle.dct(row, remove)
        assert parent == expected
        assert_close(found, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, EXACT])
@pytest.mark.parametrize("count, remove", [(16, 5), (576, 512), (577, 1)])
def test_dct_keeps_a_constant_sequence(count, remove, dtype):
    x = torch.full((1, count, 2), 3.0, dtype=dtype)
    torch.testing.assert_close(reduced(x, decide(x, remove, "dct"), remove), x[:, remove:], rtol=0, atol=1e-4)


def test_dct_keeps_low_frequencies_and_cuts_high_ones():
    position, shorter = ((torch.arange(n, dtype=EXACT) + 0.5) / n for n in (64, 16))
    x = torch.stack([torch.cos(torch.pi * k * position) for k in (3, 20)], -1)[None]
    expected = torch.stack([torch.cos(torch.pi * 3 * shorter), torch.zeros(16, dtype=EXACT)], -1)[None]
    torch.testing.assert_close(reduced(x, decide(x, 48, "dct"), 48), expected, rtol=0, atol=1e-12)


# DiffRate


@pytest.mark.parametrize("prune", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", CASES)
def test_diffrate_equals_the_oracle(count, remove, prune):
    x, attention = tokens(2, count, dtype=EXACT, seed=count), given("diffrate", 2, count)["class_attention"]
    result = choose(x, remove, "diffrate", class_attention=attention, prune=prune)
    for row, seen, *found in zip(
        x.tolist(), attention.tolist(), result.parent.tolist(), result.weight.tolist()
    ):
        assert tuple(found) == oracle.diffrate(row, remove, seen, prune)


def test_diffrate_drops_the_least_attended_half_of_the_removed_tokens():
    attention = torch.tensor([[0.3, 0.1, 0.5, 0.2, 0.4, 0.6]])
    result = choose(tokens(1, 6), 4, "diffrate", class_attention=attention)
    assert result.weight.tolist() == [[1, 0, 1, 0, 1, 1]]
    assert positions(result.parent) == [[2, 5]]


# Grid


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 7), (7, 1), (4, 4), (3, 5), (5, 3), (2, 9), (6, 6)])
def test_grid_equals_the_oracle_for_every_count(rows, columns):
    x = torch.zeros(2, rows * columns, 4)
    for remove in range(1, rows * columns):
        parent = parents(x, remove, "grid", grid=(rows, columns))
        assert parent.tolist() == [oracle.grid(remove, rows, columns)] * 2


@pytest.mark.parametrize("side, cells", [(24, 64), (24, 144), (6, 9), (24, 55), (24, 571), (7, 10)])
def test_cells_of_the_grid_are_rectangles_and_nearly_squares(side, cells):
    parent = parents(torch.zeros(1, side * side, 1), side * side - cells, "grid", grid=(side, side))[0]
    assert len(parent.unique()) == cells
    for centre in parent.unique().tolist():
        members = (parent == centre).nonzero().flatten()
        rows, columns = (members // side).unique(), (members % side).unique()
        assert len(members) == len(rows) * len(columns)
        assert max(len(rows), len(columns)) <= 3 * min(len(rows), len(columns))
        assert centre == rows[(len(rows) - 1) // 2] * side + columns[(len(columns) - 1) // 2]


def test_a_grid_of_four_by_four_is_pooled_two_by_two():
    parent = parents(torch.zeros(1, 16, 1), 12, "grid", grid=(4, 4))
    assert parent.view(4, 4).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [8, 8, 10, 10], [8, 8, 10, 10]]


# FastV, VisionZip, PruMerge


@pytest.mark.parametrize("method", ["fastv", "fastv-last"])
@pytest.mark.parametrize("count, remove", CASES)
def test_fastv_equals_the_oracle(method, count, remove):
    inputs = given(method, 2, count)
    (attention,) = inputs.values()
    parent = choose(tokens(2, count), remove, method, **inputs).parent
    assert positions(parent) == [oracle.fastv(remove, row) for row in attention.tolist()]


@pytest.mark.parametrize("contextual", [0.0, 10 / 64, 0.5, 1.0])
@pytest.mark.parametrize("count, remove", CASES)
def test_visionzip_equals_the_oracle(count, remove, contextual):
    x, attention = tokens(2, count, dtype=EXACT, seed=count), given("visionzip", 2, count)["class_attention"]
    parent = parents(x, remove, "visionzip", class_attention=attention, contextual=contextual)
    rows = zip(x.tolist(), attention.tolist())
    assert parent.tolist() == [oracle.visionzip(row, remove, seen, contextual) for row, seen in rows]


@pytest.mark.parametrize("length, dominant", [(64, 54), (128, 108), (192, 162)])
def test_visionzip_divides_as_the_paper_does(length, dominant):
    attention = given("visionzip", 1, 576)["class_attention"]
    parent = parents(tokens(1, 576), 576 - length, "visionzip", class_attention=attention)
    group = torch.bincount(parent[0], minlength=576)
    assert (group[attention[0].argsort(descending=True)[:dominant]] == 1).all()
    assert (group > 0).sum() == length


@pytest.mark.parametrize("attended, neighbours", [(32 / 144, 32), (0.0, 3), (1.0, 1), (0.5, 0)])
@pytest.mark.parametrize("count, remove", CASES)
def test_prumerge_equals_the_oracle(count, remove, attended, neighbours):
    x, attention = tokens(2, count, dtype=EXACT, seed=count), given("prumerge", 2, count)["class_attention"]
    options = {"attended": attended, "neighbours": neighbours}
    result = choose(x, remove, "prumerge", class_attention=attention, **options)
    for i, row in enumerate(x.tolist()):
        parent, values = oracle.prumerge(row, remove, attention[i].tolist(), attended, neighbours)
        assert result.parent[i].tolist() == parent
        assert_close(reduced(x, result, remove)[i], values)


@pytest.mark.parametrize("x", [tokens(2, 40), torch.zeros(2, 40, 4)], ids=["random", "equal"])
def test_prumerge_averages_each_kept_token_and_its_neighbours(x):
    result = decide(x, 30, "prumerge", neighbours=6)
    assert ((result.mixing > 0).sum(2) == 7).all()
    own = result.mixing.gather(2, torch.tensor(positions(result.parent)).unsqueeze(2))
    assert (own > 0).all()


# DivPrune


@pytest.mark.parametrize("count, remove", CASES)
def test_divprune_equals_the_oracle(count, remove):
    x = tokens(3, count, dtype=EXACT, seed=count)
    assert positions(parents(x, remove, "divprune")) == [oracle.divprune(row, remove) for row in x.tolist()]


@pytest.mark.parametrize("remove, expected", [(5, [3]), (4, [3, 5]), (3, [0, 3, 5])])
def test_divprune_starts_with_the_token_farthest_from_its_nearest(remove, expected):
    angle = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0, 3.1], dtype=EXACT)
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert positions(parents(x, remove, "divprune")) == [expected]


def test_divprune_takes_equal_tokens_by_index_and_none_twice():
    assert positions(parents(torch.ones(2, 9, 4), 4, "divprune")) == [[0, 1, 2, 3, 4]] * 2


# SparseVLM

SPARSE = [{}, {"recycled": 1.0, "peaks": 0.25}, {"recycled": 0.6, "peaks": 0.5, "neighbours": 2},
          {"recycled": 0.0}, {"peaks": 0.0}]  # fmt: skip


@pytest.mark.parametrize("parameters", SPARSE)
@pytest.mark.parametrize("count, remove", CASES)
def test_sparsevlm_equals_the_oracle(count, remove, parameters):
    x, inputs = tokens(3, count, dtype=EXACT, seed=count), given("sparsevlm", 3, count, dtype=EXACT)
    result = choose(x, remove, "sparsevlm", **inputs, **parameters)
    for i, row in enumerate(x.tolist()):
        score = oracle.ratings(row, *(inputs[name][i].tolist() for name in METHODS["sparsevlm"].needs))
        found = result.parent[i].tolist(), result.weight[i].tolist()
        assert found == oracle.sparsevlm(row, remove, score, **parameters)


def test_sparsevlm_ignores_padding():
    x, inputs = tokens(3, 20), given("sparsevlm", 3, 20)
    padding = ~inputs["text_mask"].unsqueeze(2)
    assert padding.any()
    text, attention = (
        inputs["text"].masked_fill(padding, 100),
        inputs["text_attention"].masked_fill(padding, torch.nan),
    )
    one = choose(x, 12, "sparsevlm", **inputs)
    other = choose(x, 12, "sparsevlm", **{**inputs, "text": text, "text_attention": attention})
    assert torch.equal(one.parent, other.parent)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("words", range(WORDS + 1))
def test_equal_text_tokens_are_all_raters(words):
    inputs = given("sparsevlm", 3, 20)
    attention, mask = inputs["text_attention"], (torch.arange(WORDS) < words).expand(3, -1)
    inputs = {"text": torch.zeros_like(inputs["text"]), "text_attention": attention, "text_mask": mask}
    parent = choose(tokens(3, 20), 12, "sparsevlm", **inputs, recycled=0.0).parent
    assert positions(parent) == [oracle.fastv(12, row) for row in attention[:, :words].sum(1).tolist()]


def test_sparsevlm_recycles_the_counts_of_its_shares():
    assert recycled_counts(576, 512, 0.3, 0.1) == (158, 16)  # 48 are kept for their scores
    assert recycled_counts(576, 569, 0.3, 0.1)[1] == 3  # at most half of those kept
    assert recycled_counts(576, 575, 0.3, 0.1)[1] == 0
    assert recycled_counts(8, 1, 1.0, 1.0)[1] == 3
    for remove in range(1, 40):
        pooled, groups = recycled_counts(40, remove, 0.3, 0.1)
        assert groups <= pooled <= remove + groups


@pytest.mark.parametrize("count, neighbours", [(1, 1), (4, 2), (9, 20)])
def test_density_peaks_equal_the_oracle(count, neighbours):
    x = tokens(2, 9, dtype=EXACT)
    expected = [sorted(oracle.density_peaks(row, count, neighbours)) for row in x.tolist()]
    assert density_peaks(x, count, neighbours).tolist() == expected


@pytest.mark.parametrize(
    "method, parameters",
    [("diffrate", {}), ("visionzip", {"contextual": 0.0}), ("prumerge", {"attended": 1.0})],
)
def test_of_equally_attended_tokens_the_first_are_kept(method, parameters):
    result = choose(tokens(1), 12, method, class_attention=torch.full((1, 16), 0.1), **parameters)
    assert positions(result.parent)[0][:3] == [0, 1, 2]
