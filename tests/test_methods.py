import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from given import PRUNING, at, decide, given, kept, mapped, tokens

from llava_pitome import METHODS, parents
from llava_pitome.methods import METHOD_INPUTS, PLACES, Method, parameter, pitome, register_method
from llava_pitome.methods.registry import choose, parameters_of

GOLDEN = Path(__file__).parent / "golden"
SIZES = ((16, 4), (17, 8), (36, 3), (49, 24))
ROUNDS = ((5, 3), (16, 9), (16, 15), (49, 40), (2, 1), (36, 35), (1, 0))
IN_FLOAT64 = [(count, remove, torch.float64) for count, remove in SIZES + ROUNDS]
IN_ALL_DTYPES = [*IN_FLOAT64, (49, 24, torch.float32), (49, 24, torch.bfloat16)]
EXACT = torch.float64


def golden():
    """Returns the committed cases, each with its arrays."""
    arrays = np.load(GOLDEN / "matching.npz")
    cases = json.loads((GOLDEN / "matching.json").read_text())
    names = [(case, case["name"] + ".") for case in cases]
    return [(case, {k.removeprefix(n): arrays[k] for k in arrays if k.startswith(n)}) for case, n in names]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def smallest(parent):
    """Returns for each token the smallest index of its group."""
    return (parent[:, :, None] == parent[:, None, :]).long().argmax(-1)


@pytest.mark.parametrize("case, arrays", [pytest.param(c, a, id=c["name"]) for c, a in golden()])
def test_golden_vectors_match_in_float64(case, arrays):
    x = torch.from_numpy(arrays["features"]).double()
    if case.get("method") == "tome":
        groups = {"groups": parents(x, case["remove"], "tome")}
    else:
        options = {"margin": case["margin"], "alpha": case["alpha"]}
        energy = pitome.mean_energy(unit(x), case["margin"], case["alpha"])
        torch.testing.assert_close(energy, torch.from_numpy(arrays["energy_eq4"]), rtol=0, atol=1e-12)
        groups = {f"groups_{e}": parents(x, case["remove"], energy=e, **options) for e in ("eq4", "elu")}
    compared = [name for name in groups if name in arrays]
    assert compared
    for name in compared:
        assert torch.equal(smallest(groups[name]), torch.from_numpy(arrays[name]).long()), name


# PiToMe's energy and matching


@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize(
    "margin, alpha", [(0.9, 1), (0.2, 1), (0, 0.5), (-0.3, 2), (-800, 1), (-2, 1), (90, 1)]
)
def test_energy_is_the_mean_over_all_tokens(energy, margin, alpha):
    x = tokens(2, 11, dtype=EXACT)
    expected = [oracle.energies(row, margin, alpha, energy) for row in x.tolist()]
    energies = pitome.mean_energy(unit(x), margin, alpha, energy)
    torch.testing.assert_close(energies, torch.tensor(expected, dtype=EXACT))


def test_similarity_at_the_margin_counts_as_above_it():
    x = torch.tensor([[[1.0, 0.0], [0.5, 0.0], [0.5, 0.0]]], dtype=EXACT)  # products 1, 0.5, 0.5 to the bit
    assert pitome.mean_energy(x, 0.5)[0, 0].item() == pytest.approx((1 + 0.5 + 0.5) / 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_number_below_a_margin_is_the_next_of_its_dtype(dtype):
    drawn = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=EXACT).tolist()
    for margin in [0, 0.9, 0.5, -0.5, 1, -1, 2**-20, 1e-8, 1e-45, -1e-300, *drawn, *(-m for m in drawn)]:
        rounded = torch.tensor(float(margin), dtype=dtype)
        expected = torch.nextafter(rounded, torch.tensor(-torch.inf, dtype=dtype)).item()
        assert pitome.next_below(margin, dtype) == expected, margin


@pytest.mark.parametrize("count", [257, 300, 577])
def test_blocks_of_similarities_change_no_energy(count, monkeypatch):
    x = unit(tokens(2, count, dtype=EXACT))
    in_blocks = pitome.mean_energy(x, 0.3)
    monkeypatch.setattr(pitome, "SMALL", 10**9)
    torch.testing.assert_close(in_blocks, pitome.mean_energy(x, 0.3), rtol=0, atol=1e-14)


def test_matching_ignores_the_default_device():
    x = tokens(1, 12)
    with torch.device("meta"):
        assert pitome.mean_energy(unit(x), 0.3).device.type == "cpu"


@pytest.mark.parametrize("dynamic", [False, True])
def test_pitome_compiles_into_one_graph_at_every_depth(dynamic):
    def matched(x, depth):
        return choose(x, 9, "pitome", depth=depth).parent

    torch.compiler.reset()
    compiled = torch.compile(matched, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for depth, count in ((0.1, 49), (0.2, 49), (0.3, 36)):
        x = tokens(2, count)
        assert torch.equal(compiled(x, depth), matched(x, depth))
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_pitome_exports(strict):
    class Matching(torch.nn.Module):
        def forward(self, x):
            return choose(x, 9, "pitome", depth=0.3).parent

    x = tokens(2, 49)
    program = torch.export.export(Matching(), (x,), strict=strict)
    assert torch.equal(program.module()(x), Matching()(x))


@pytest.mark.parametrize("count, remove", [(3, 1), (7, 2), (12, 6), (13, 6), (20, 5)])
@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize("margin, alpha", [(0.9, 1.0), (0.3, 0.5), (0.0, 1.0)])
def test_pitome_equals_the_oracle(count, remove, energy, margin, alpha):
    x = tokens(2, count, dtype=EXACT, seed=count)
    parent = parents(x, remove, margin=margin, alpha=alpha, energy=energy)
    assert parent.tolist() == [oracle.pitome(row, remove, margin, alpha, energy) for row in x.tolist()]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 23 / 24])
def test_the_margin_falls_with_depth_from_0_9_to_0(depth):
    x = tokens(2, 20, dtype=EXACT)
    assert torch.equal(parents(x, 7, depth=depth), parents(x, 7, margin=0.9 - 0.9 * depth))


def test_depth_and_energy_change_what_merges():
    x = tokens(4, 49)
    assert not torch.equal(parents(x, 12, depth=0.0), parents(x, 12, depth=0.9))
    assert not torch.equal(parents(x, 12, margin=0.1), parents(x, 12, margin=0.1, energy="elu"))


def test_methods_without_energies_have_none():
    assert METHODS["tome"]().energies(tokens()) is None
    assert METHODS["pitome"]().energies(tokens()).shape == (3, 16)


# ToMe and the random control


@pytest.mark.parametrize("count, remove", [(3, 1), (7, 2), (12, 6), (13, 6), (20, 5)])
def test_tome_equals_the_oracle(count, remove):
    x = tokens(2, count, dtype=EXACT, seed=count)
    assert parents(x, remove, "tome").tolist() == [oracle.tome(row, remove) for row in x.tolist()]


def test_random_draws_the_same_for_every_image_and_call():
    x, state = tokens(3, 30), torch.random.get_rng_state()
    first, again = parents(x, 9, "random", seed=5), parents(x, 9, "random", seed=5)
    assert torch.equal(first, again)
    assert (kept(first) == kept(first)[:1]).all()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("change", [{"seed": 6}, {"seed": 5, "depth": 0.5}])
def test_random_draws_differently_for_another_seed_or_depth(change):
    x = tokens(1, 30)
    assert not torch.equal(parents(x, 9, "random", seed=5), parents(x, 9, "random", **change))


def test_random_merges_into_the_most_similar_kept_token():
    x = tokens(2, 12, dtype=EXACT)
    for row, parent in zip(x.tolist(), parents(x, 4, "random").tolist()):
        stays = [i for i in range(12) if parent[i] == i]
        assert parent == [oracle.closest(row, i, stays) for i in range(12)]


# All methods


@pytest.mark.parametrize("count, remove, dtype", IN_ALL_DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_decisions_are_consistent(method, count, remove, dtype):
    result = decide(tokens(count=count, dtype=dtype), remove, method)
    assert result.parent.shape == (3, count)
    assert result.parent.dtype == torch.int64
    assert torch.equal(result.parent.gather(1, result.parent), result.parent)
    assert kept(result.parent).sum(1).tolist() == [count - remove] * 3
    assert result.order is None
    assert result.prunes == (method in PRUNING and remove > 0)
    if result.weight is not None:
        assert result.weight.shape == (3, count)
        assert result.weight[kept(result.parent)].eq(1).all()
        assert result.weight.ge(0).all()
    if result.mixing is not None:
        assert result.mixing.shape in ((3, count - remove, count), (1, count - remove, count))
        total = result.mixing.double().sum(2)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_count_can_be_kept(method):
    for remove in range(12):
        assert kept(decide(tokens(2, 12), remove, method).parent).sum(1).tolist() == [12 - remove] * 2


@pytest.mark.parametrize("method", PRUNING)
def test_the_parent_of_a_dropped_token_is_the_kept_one_before_it_or_the_first(method):
    for row in decide(tokens(), 9, method).parent.tolist():
        stays = [i for i in range(16) if row[i] == i]
        assert row == [max([k for k in stays if k <= i], default=stays[0]) for i in range(16)]


def test_a_second_round_matches_the_averages_of_the_first():
    x = tokens(1, 8, dtype=EXACT)
    first = oracle.tome(x[0].tolist(), 4)
    stays = [i for i in range(8) if first[i] == i]
    means = [x[0][[j for j in range(8) if first[j] == i]].mean(0).tolist() for i in stays]
    second = [stays[j] for j in oracle.tome(means, 1)]
    assert parents(x, 5, "tome").tolist() == [[second[stays.index(first[i])] for i in range(8)]]


@pytest.mark.parametrize(
    "method, remove, expected", [("pitome", 6, True), ("pitome", 15, True), ("tome", 6, False)]
)
def test_a_methods_own_order_is_returned_on_request(method, remove, expected):
    assert METHODS[method].has_order == expected
    result = decide(tokens(count=20), remove, method, ordered=True)
    assert (result.order is not None) == expected
    assert torch.equal(result.parent, decide(tokens(count=20), remove, method).parent)
    assert not expected or (result.order.sort().values == torch.arange(20)).all()


def test_pitomes_order_puts_protected_tokens_before_merged_ones_by_energy():
    x = tokens(1, 12, dtype=EXACT)
    ranking = oracle.by_energy(x[0].tolist(), 0.9)
    order = decide(x, 4, "pitome", ordered=True).order[0].tolist()
    assert sorted(range(12), key=order.__getitem__) == ranking[8:] + ranking[:8]


def assert_same(one, other):
    """Two decisions are equal, with or without a batch dimension of mixing coefficients."""
    assert torch.equal(one.parent, other.parent)
    for a, b in ((one.weight, other.weight), (one.mixing, other.mixing)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [[0], [2], [2, 0, 3, 1]])
@pytest.mark.parametrize("remove", [5, 15])
@pytest.mark.parametrize("method", METHODS)
def test_images_of_a_batch_are_independent(method, remove, rows):
    x, inputs = tokens(4, 20, dtype=EXACT), given(method, 4, 20, dtype=EXACT)
    batch, alone = choose(x, remove, method, **inputs), choose(x[rows], remove, method, **at(inputs, rows))
    values = [t if t is None or len(t) == 1 else t[rows] for t in batch[:3]]
    assert_same(alone, batch._replace(parent=values[0], weight=values[1], mixing=values[2]))


@pytest.mark.parametrize("method", METHODS)
def test_decisions_repeat_and_change_no_input(method):
    x, inputs = tokens(), given(method)
    copy, copies = x.clone(), mapped(inputs, torch.clone)
    assert_same(choose(x, 9, method, **inputs), choose(x, 9, method, **inputs))
    assert torch.equal(x, copy)
    assert all(torch.equal(torch.as_tensor(inputs[n]), torch.as_tensor(v)) for n, v in copies.items())


@pytest.mark.parametrize("count, remove", [(16, 5), (49, 40)])
@pytest.mark.parametrize("method", METHODS)
def test_no_value_of_a_tensor_is_read(method, count, remove):
    """What CUDA graphs need: tensors on the meta device have no values."""
    inputs = mapped(given(method, 3, count), lambda value: value.to("meta"))
    result = choose(tokens(count=count).to("meta"), remove, method, **inputs)
    assert result.parent.shape == (3, count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, EXACT])
@pytest.mark.parametrize("remove", [1, 2, 4])
def test_ties_go_to_the_lower_index(remove, dtype):
    same, positions = torch.ones(1, 9, 4, dtype=dtype), range(9)
    ranking = positions[: 2 * remove]  # A and B alternate; all of A merges into the first of B
    assert parents(same, remove, "pitome").tolist() == [[1 if i in ranking[::2] else i for i in positions]]
    gone = positions[::2][:remove]
    assert parents(same, remove, "tome").tolist() == [[1 if i in gone else i for i in positions]]


@pytest.mark.parametrize("method", [m for m in METHODS if "text" not in METHODS[m].needs])
def test_the_length_of_a_token_does_not_matter(method):  # of a text token it does
    x = tokens(2, 20, dtype=EXACT)
    lengths = torch.rand(2, 20, 1, dtype=EXACT) + 0.5
    assert torch.equal(decide(x, 6, method).parent, decide(x * lengths, 6, method).parent)


@pytest.mark.parametrize("metric", [torch.zeros(3, 16, 8), torch.ones(3, 16, 8)], ids=["zeros", "ones"])
@pytest.mark.parametrize("remove", [4, 9])
@pytest.mark.parametrize("method", METHODS)
def test_equal_tokens_of_no_attention_still_merge(method, remove, metric):
    result = choose(metric, remove, method, **mapped(given(method), torch.zeros_like))
    assert kept(result.parent).sum(1).tolist() == [16 - remove] * 3
    assert result.mixing is None or result.mixing.isfinite().all()


# Errors


@pytest.mark.parametrize(
    "method, parameters, message",
    [
        ("pitme", {}, r"method='pitme' is unknown; allowed are pitome, tome, random"),
        (7, {}, r"method=7 is unknown"),
        ("tome", {"margin": 1}, r"'tome' has no parameter 'margin'; it takes none"),
        ("pitome", {"sharpness": 1}, r"'pitome' has no parameter 'sharpness'; it takes margin, start, end"),
        ("pitome", {"energy": "eq5"}, r"energy='eq5' is unknown; allowed are eq4, elu"),
        ("pitome", {"split": None}, r"split=None is unknown; allowed are energy, raster"),
        ("pitome", {"margin": float("nan")}, r"margin=nan is not allowed: it must be a finite number"),
        ("pitome", {"alpha": None}, r"alpha=None is not allowed: it must be a finite number"),
        ("pitome", {"end": float("inf")}, r"end=inf is not allowed: it must be a finite number"),
        ("pitome", {"candidates": 1.9}, r"candidates=1.9 is not allowed: it must be a number from 2"),
        ("random", {"seed": -1}, r"seed=-1 is not allowed: it must be a whole number from 0"),
        ("random", {"seed": True}, r"seed=True is not allowed: it must be a whole number from 0"),
        ("tofu", {"prune_until": 1.5}, r"prune_until=1.5 is not allowed: it must be a number from 0 to 1"),
        ("tofu", {"prune_until": "half"}, r"prune_until='half' is not allowed"),
        ("diffrate", {"prune": True}, r"prune=True is not allowed: it must be a number from 0 to 1"),
        ("visionzip", {"contextual": 2}, r"contextual=2 is not allowed: it must be a number from 0 to 1"),
        ("prumerge", {"attended": float("nan")}, r"attended=nan is not allowed"),
        ("prumerge", {"neighbours": 2.0}, r"neighbours=2.0 is not allowed: it must be a whole number from 0"),
        ("sparsevlm", {"neighbours": 0}, r"neighbours=0 is not allowed: it must be a whole number from 1"),
        ("sparsevlm", {"peaks": None}, r"peaks=None is not allowed: it must be a number from 0 to 1"),
        ("grid", {"grid": (3, 5)}, r"grid=\(3, 5\) is not allowed: rows times columns must be the 16 tokens"),
        ("fastv", {"grid": (4, 4)}, r"method 'fastv' takes no grid; it needs received_attention"),
        ("tome", {"grid": (4, 4)}, r"method 'tome' takes no grid; it needs no inputs"),
        ("sparsevlm", {"text": tokens()}, r"method 'sparsevlm' needs text_attention, text_mask"),
    ],
)
def test_what_a_method_does_not_take_raises(method, parameters, message):
    with pytest.raises(ValueError, match=message):
        parents(tokens(), 4, method, **parameters)


@pytest.mark.parametrize("metric", [torch.zeros(16), torch.zeros(1, 2, 16, 8), torch.zeros(1, 16, 8).long()])
def test_a_metric_of_another_shape_or_dtype_raises(metric):
    with pytest.raises(ValueError, match="metric has"):
        parents(metric, 1)


@pytest.mark.parametrize("remove", [-1, 16, 17, 1.0])
def test_removing_a_count_out_of_range_raises(remove):
    with pytest.raises(ValueError, match=rf"remove={remove} .*0 to 15"):
        parents(tokens(), remove)


# The registry


@pytest.mark.parametrize("method", METHODS)
def test_registered_methods_have_defaults_and_known_inputs(method):
    cls = METHODS[method]
    assert set(cls.needs) <= set(METHOD_INPUTS)
    assert cls.places and set(cls.places) <= set(PLACES)
    assert cls.needs_grid == ("grid" in cls.needs)
    assert hash(cls()) == hash(cls())
    in_llm = {"received_attention", "last_attention", "text"} & set(cls.needs)
    assert not in_llm or cls.places == ("decoder",)


@pytest.fixture
def methods():
    """The registry, restored after a test."""
    before = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(before)


@dataclass(frozen=True)
class First(Method):
    needs = ("grid",)
    rows: int | None = parameter(None, "kept in rows", least=2)

    def merge(self, metric, remove, depth=0.0, *, grid):
        positions = torch.arange(metric.shape[1]).expand(len(metric), -1)
        return METHODS["tome"]().merge(metric, 0)._replace(parent=positions.clamp(max=grid[0] - 1))


def test_a_registered_method_is_used_by_its_name(methods):
    assert register_method("first")(First) is First
    assert register_method("first")(First) is First  # a notebook's cell runs again
    assert methods["first"].needs_grid
    assert parameters_of("first") == ("rows",)
    assert parents(torch.ones(1, 4, 2), 2, "first", grid=(2, 2)).tolist() == [[0, 1, 1, 1]]
    with pytest.raises(ValueError, match="rows=1 is not allowed: it must be a whole number from 2"):
        parents(torch.ones(1, 4, 2), 2, "first", grid=(2, 2), rows=1)


@pytest.mark.parametrize(
    "name, attributes, message",
    [
        ("tome", {}, "'tome' is registered already, as llava_pitome.methods.tome.ToMe"),
        ("mine", {"needs": ("attention",)}, "'mine' needs 'attention'; allowed are sizes"),
        ("mine", {"places": ("llm",)}, "'mine' places 'llm'; allowed are tower, prefix, decoder"),
        ("mine", {"pairs_tokens": True, "needs": ("grid",)}, "'mine' runs in rounds, so it cannot need grid"),
        ("mine", {"share": parameter(0.5, "share")}, r"'mine' has parameters: make Mine a dataclass"),
    ],
)
def test_a_class_that_cannot_be_registered_raises(methods, name, attributes, message):
    with pytest.raises(ValueError, match=message):
        register_method(name)(type("Mine", (Method,), attributes))


def test_a_method_with_an_undeclared_parameter_is_refused():
    from dataclasses import dataclass

    with pytest.raises(ValueError, match=r"declare 'strength' with parameter\(default, help\)"):

        @register_method("undeclared")
        @dataclass(frozen=True)
        class Undeclared(Method):
            strength: float = 0.5

    assert "undeclared" not in METHODS


def test_a_parameter_may_be_true_or_false(monkeypatch):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Flagged(Method):
        flag: bool = parameter(True, "what it does")

    try:
        register_method("flagged")(Flagged)
        assert Flagged().flag and not Flagged(flag=False).flag
        with pytest.raises(ValueError, match="flag=1 is not allowed: it must be True or False"):
            Flagged(flag=1)
    finally:
        METHODS.pop("flagged", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("remove", [5, 29])
@pytest.mark.parametrize("method", METHODS)
def test_parents_are_computed_in_float32_at_least(method, remove, autocast, dtype):
    x = (tokens(2, 36, 8) + 20).to(dtype)  # similarities near 1, which half precision cannot tell apart
    inputs = mapped(given(method, 2, 36, 8), lambda v: v.to(dtype) if v.is_floating_point() else v)
    wide = mapped(inputs, lambda v: v.float() if v.is_floating_point() else v)
    expected = parents(x.float(), remove, method, **wide)
    with torch.autocast("cpu", enabled=autocast, dtype=torch.bfloat16):
        assert torch.equal(parents(x, remove, method, **inputs), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parents_of_float64_are_computed_in_float64(method):
    x = 1 + 1e-9 * tokens(2, 36, 8, dtype=EXACT)  # all the same in float32
    inputs = given(method, 2, 36, 8, dtype=EXACT)
    decided = choose(x, 9, method, **inputs).parent
    assert torch.equal(parents(x, 9, method, **inputs), decided)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.float8_e8m0fnu])
@pytest.mark.parametrize("method", METHODS)
def test_parents_of_8_bits_are_computed_in_float32(method, dtype):
    x = tokens(2, 36, 8).to(dtype)
    inputs = mapped(given(method, 2, 36, 8), lambda v: v.to(dtype) if v.is_floating_point() else v)
    wide = mapped(inputs, lambda v: v.float() if v.is_floating_point() else v)
    expected = parents(x.float(), 9, method, **wide)
    assert torch.equal(parents(x, 9, method, **inputs), expected)
    assert torch.equal(parents(x.float(), 9, method, **inputs), expected)


def test_a_dtype_of_packed_numbers_is_refused():
    packed = torch.zeros(1, 4, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(ValueError, match=r"metric has dtype torch\.float4_e2m1fn_x2; it must be floating"):
        parents(packed, 1)
    with pytest.raises(ValueError, match=r"class_attention has dtype torch\.float4_e2m1fn_x2"):
        parents(torch.zeros(1, 4, 8), 1, "visionzip", class_attention=packed[..., 0])
