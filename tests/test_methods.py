import ast
import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from given import at, given, survivors, tokens

from llava_pitome import METHODS, parents
from llava_pitome import methods as package
from llava_pitome.methods import METHOD_INPUTS, PLACES, pitome
from llava_pitome.methods.registry import choose

HERE = Path(__file__).parent / "golden"
ALL = Path(__file__).parents[2] / "shared" / "golden"  # beside the checkout, where there is one
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = ((16, 4), (17, 8), (36, 3), (49, 24))
ROUNDS = ((5, 3), (16, 9), (16, 15), (49, 40), (2, 1), (36, 35), (1, 0))


def golden(folder):
    arrays = np.load(folder / "matching.npz")
    return [
        (
            case,
            {
                k.removeprefix(case["name"] + "."): arrays[k]
                for k in arrays
                if k.startswith(case["name"] + ".")
            },
        )
        for case in json.loads((folder / "matching.json").read_text())
    ]


CASES = [
    pytest.param(case, arrays, id=f"{folder.parent.name}-{case['name']}")
    for folder in (HERE, ALL)
    if folder.exists()
    for case, arrays in golden(folder)
]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def smallest(parent):
    """For each token the smallest index of its group."""
    together = parent[:, :, None] == parent[:, None, :]
    return together.long().argmax(-1)


def found(x, remove, method, **parameters):
    """Parents by a method that is given what it needs."""
    return parents(x, remove, method, **given(method, *x.shape, x.dtype), **parameters)


@pytest.mark.parametrize("case, arrays", CASES)
def test_golden_vectors_match_in_float64(case, arrays):
    x = torch.from_numpy(arrays["features"]).double()
    if case.get("method") == "tome":
        groups = {"groups": parents(x, case["remove"], "tome")}
    else:
        known = {"margin": case["margin"], "alpha": case["alpha"]}
        energy = pitome.mean_energy(unit(x), case["margin"], case["alpha"])
        torch.testing.assert_close(energy, torch.from_numpy(arrays["energy_eq4"]), rtol=0, atol=1e-12)
        groups = {f"groups_{e}": parents(x, case["remove"], energy=e, **known) for e in ("eq4", "elu")}
    compared = [name for name in groups if name in arrays]
    assert compared
    for name in compared:
        assert torch.equal(smallest(groups[name]), torch.from_numpy(arrays[name]).long()), name


def test_the_committed_golden_cases_cover_every_size_ratio_margin_and_method():
    cases = [case for case, _ in golden(HERE)]
    assert {c["patches"] for c in cases if "patches" in c} == {16, 49, 196, 576}
    assert {c["ratio"] for c in cases if "ratio" in c} == {0.5, 0.7, 0.9, 0.95}
    assert {c["margin"] for c in cases if "margin" in c} == {0.9, 0.45, 0.0}
    assert {c["tokens"] for c in cases if "tokens" in c} == {16, 50}


@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize("margin, alpha", [(0.9, 1.0), (0.2, 1.0), (0.0, 0.5), (-0.3, 2.0)])
def test_the_energy_is_the_mean_over_all_tokens_itself_included(energy, margin, alpha):
    x = tokens(2, 11, dtype=torch.float64)
    expected = torch.tensor(
        [oracle.energies(row, margin, alpha, energy) for row in x.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(pitome.mean_energy(unit(x), margin, alpha, energy), expected)


@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize("margin", [-800.0, -100.0, -2.0, 2.0, 90.0])
def test_margins_that_no_similarity_reaches_are_no_matter(margin, energy):
    x = tokens(2, 11, dtype=torch.float64)
    expected = [oracle.energies(row, margin, 1.0, energy) for row in x.tolist()]
    found = pitome.mean_energy(unit(x), margin, 1.0, energy)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_similarity_of_exactly_the_margin_counts_as_above_it():
    x = torch.tensor([[[1.0, 0.0], [0.5, 0.75**0.5], [0.5, 0.75**0.5]]], dtype=torch.float64)
    x[0, 1:, 1] = 0  # not of length 1: the products are 1, 0.5, 0.5 to the bit
    found = pitome.mean_energy(x, 0.5)
    assert found[0, 0].item() == pytest.approx((1 + 0.5 + 0.5) / 3)


@pytest.mark.parametrize("count", [257, 300, 577])
def test_blocks_of_similarities_change_no_energy(count, monkeypatch):
    x = unit(tokens(2, count, dtype=torch.float64))
    found = pitome.mean_energy(x, 0.3)
    monkeypatch.setattr(pitome, "SMALL", 10**9)
    torch.testing.assert_close(found, pitome.mean_energy(x, 0.3), rtol=0, atol=1e-14)


def test_another_default_device_is_no_matter():
    x = tokens(1, 12)
    with torch.device("meta"):
        pitome._BEFORE.clear()
        assert pitome.mean_energy(unit(x), 0.3).device.type == "cpu"


def test_the_energy_of_eq_4_is_known_for_two_right_angles():
    x = torch.eye(2, dtype=torch.float64)[None]
    expected = (1 + np.exp(-0.9) - 1) / 2  # once itself, once a token at a right angle
    torch.testing.assert_close(
        pitome.mean_energy(unit(x), 0.9), torch.full((1, 2), expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("count, remove", [(3, 1), (7, 2), (12, 6), (13, 6), (20, 5)])
@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize("margin, alpha", [(0.9, 1.0), (0.3, 0.5), (0.0, 1.0)])
def test_pitome_does_what_a_plain_python_oracle_does(count, remove, energy, margin, alpha):
    x = tokens(2, count, dtype=torch.float64, seed=count)
    parent = parents(x, remove, margin=margin, alpha=alpha, energy=energy)
    assert parent.tolist() == [oracle.pitome(row, remove, margin, alpha, energy) for row in x.tolist()]


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 23 / 24])
def test_the_margin_falls_with_depth_from_0_9_to_0(depth):
    x = tokens(2, 20, dtype=torch.float64)
    assert torch.equal(parents(x, 7, depth=depth), parents(x, 7, margin=0.9 - 0.9 * depth))


def test_depth_and_energy_change_who_merges():
    x = tokens(4, 49)
    assert not torch.equal(parents(x, 12, depth=0.0), parents(x, 12, depth=0.9))
    assert not torch.equal(parents(x, 12, margin=0.1), parents(x, 12, margin=0.1, energy="elu"))


@pytest.mark.parametrize("count, remove", [(3, 1), (7, 2), (12, 6), (13, 6), (20, 5)])
def test_tome_does_what_a_plain_python_oracle_does(count, remove):
    x = tokens(2, count, dtype=torch.float64, seed=count)
    assert parents(x, remove, "tome").tolist() == [oracle.tome(row, remove) for row in x.tolist()]


def test_random_draws_the_same_tokens_for_every_image_and_for_every_call():
    x = tokens(3, 30)
    first, again = parents(x, 9, "random", seed=5), parents(x, 9, "random", seed=5)
    gone = first != torch.arange(30)
    assert torch.equal(first, again)
    assert torch.equal(gone[0], gone[1])
    assert torch.equal(gone[0], gone[2])


@pytest.mark.parametrize("other", [{"seed": 6}, {"seed": 5, "depth": 0.5}])
def test_random_draws_differently_for_another_seed_or_depth(other):
    x = tokens(1, 30)
    assert not torch.equal(parents(x, 9, "random", seed=5), parents(x, 9, "random", **other))


def test_random_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    parents(tokens(), 5, "random")
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_joins_the_most_similar_of_those_who_stay():
    x = tokens(2, 12, dtype=torch.float64)
    parent = parents(x, 4, "random")
    for row, joined in zip(x.tolist(), parent.tolist()):
        kept = [i for i in range(12) if joined[i] == i]
        for i in set(range(12)) - set(kept):
            assert joined[i] == max(kept, key=lambda j: oracle.cosine(row[i], row[j]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_exactly_as_many_go_as_are_to_go(method, count, remove, dtype):
    parent = found(tokens(count=count, dtype=dtype), remove, method)
    assert parent.shape == (3, count)
    assert parent.dtype == torch.int64
    assert survivors(parent).tolist() == [count - remove] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_the_parent_of_a_parent_is_itself(method, count, remove, dtype):
    parent = found(tokens(count=count, dtype=dtype), remove, method)
    assert torch.equal(parent.gather(1, parent), parent)


@pytest.mark.parametrize("count, remove", ROUNDS)
@pytest.mark.parametrize("method", METHODS)
def test_more_than_half_go_at_once_or_in_rounds(method, count, remove):
    parent = found(tokens(count=count), remove, method)
    assert survivors(parent).tolist() == [count - remove] * 3
    assert torch.equal(parent.gather(1, parent), parent)


@pytest.mark.parametrize("method", METHODS)
def test_every_count_can_be_left(method):
    x = tokens(2, 12)
    for remove in range(12):
        assert survivors(found(x, remove, method)).tolist() == [12 - remove] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, remove", SIZES + ROUNDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_choice_holds_together(method, count, remove, dtype):
    x = tokens(count=count, dtype=dtype)
    choice = choose(x, remove, method, **given(method, 3, count, dtype=dtype))
    stays = choice.parent == torch.arange(count)
    if choice.weight is not None:
        assert choice.weight.shape == (3, count)
        assert choice.weight[stays].eq(1).all()
        assert choice.weight.ge(0).all()
    if choice.mixing is not None:
        assert choice.mixing.shape in ((3, count - remove, count), (1, count - remove, count))
        torch.testing.assert_close(
            choice.mixing.double().sum(2), torch.ones_like(choice.mixing[..., 0]).double(), atol=1e-5, rtol=0
        )
    assert choice.prunes == (METHODS[method].kept is not None and remove > 0)


@pytest.mark.parametrize("method", [m for m, found in METHODS.items() if found.kept])
def test_who_goes_without_leaving_anything_belongs_to_the_survivor_in_front_or_to_the_first(method):
    for row in found(tokens(), 9, method).tolist():
        kept = [i for i in range(16) if row[i] == i]
        assert row == [max([k for k in kept if k <= i], default=kept[0]) for i in range(16)]


def test_a_second_round_is_matched_on_the_averages_of_the_first():
    x = tokens(1, 8, dtype=torch.float64)
    first = oracle.tome(x[0].tolist(), 4)
    kept = [i for i in range(8) if first[i] == i]
    means = [x[0][[j for j in range(8) if first[j] == i]].mean(0).tolist() for i in kept]
    second = [kept[j] for j in oracle.tome(means, 1)]
    assert parents(x, 5, "tome").tolist() == [[second[kept.index(first[i])] for i in range(8)]]


def same(one, other):
    """Whether two choices are equal, those of a batch and those of its images."""
    assert torch.equal(one.parent, other.parent)
    for a, b in ((one.weight, other.weight), (one.mixing, other.mixing)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("remove", [5, 15])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_do_not_know_of_each_other(method, remove):
    x, needs = tokens(4, 20, dtype=torch.float64), given(method, 4, 20, dtype=torch.float64)
    together = choose(x, remove, method, **needs)
    for i in range(4):
        alone = choose(x[i : i + 1], remove, method, **at(needs, slice(i, i + 1)))
        mine = [t if t is None or len(t) == 1 else t[i : i + 1] for t in together[:3]]
        same(alone, together._replace(parent=mine[0], weight=mine[1], mixing=mine[2]))


@pytest.mark.parametrize("remove", [5, 15])
@pytest.mark.parametrize("method", METHODS)
def test_permuting_the_batch_commutes(method, remove):
    x, needs = tokens(4, 20, dtype=torch.float64), given(method, 4, 20, dtype=torch.float64)
    shuffled = [2, 0, 3, 1]
    one = choose(x[shuffled], remove, method, **at(needs, shuffled))
    other = choose(x, remove, method, **needs)
    mine = [t if t is None or len(t) == 1 else t[shuffled] for t in other[:3]]
    same(one, other._replace(parent=mine[0], weight=mine[1], mixing=mine[2]))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_is_chosen_again_and_nothing_given_is_changed(method):
    x, needs = tokens(), given(method)
    before = {name: value if isinstance(value, tuple) else value.clone() for name, value in needs.items()}
    one, copy = choose(x, 9, method, **needs), x.clone()
    same(one, choose(x, 9, method, **needs))
    assert torch.equal(x, copy)
    assert all(torch.equal(torch.as_tensor(needs[n]), torch.as_tensor(v)) for n, v in before.items())


@pytest.mark.parametrize("count, remove", [(16, 5), (49, 40)])
@pytest.mark.parametrize("method", METHODS)
def test_no_shape_depends_on_what_is_in_a_tensor(method, count, remove):
    needs = {n: v if isinstance(v, tuple) else v.to("meta") for n, v in given(method, 3, count).items()}
    choice = choose(tokens(count=count).to("meta"), remove, method, **needs)  # there is nothing to look at
    assert choice.parent.shape == (3, count)


@pytest.mark.parametrize("method", METHODS)
def test_nobody_goes_where_nobody_is_to_go(method):
    assert torch.equal(found(tokens(2, 9), 0, method), torch.arange(9).repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("remove", [1, 2, 4])
def test_ties_go_to_the_lower_index(remove, dtype):
    same = torch.ones(1, 9, 4, dtype=dtype)
    by_index = list(range(9))
    down = by_index[: 2 * remove]  # alternating, lowest index first; every a joins the first b
    expected = [1 if i in down[::2] else i for i in by_index]
    assert parents(same, remove, "pitome").tolist() == [expected]
    expected = [1 if i in by_index[::2][:remove] else i for i in by_index]
    assert parents(same, remove, "tome").tolist() == [expected]


BY_ANGLE = [m for m, found in METHODS.items() if "text" not in found.needs]  # a text's products have lengths


@pytest.mark.parametrize("method", BY_ANGLE)
def test_the_length_of_a_token_does_not_matter(method):
    x = tokens(2, 20, dtype=torch.float64)
    lengths = torch.rand(2, 20, 1, dtype=torch.float64) + 0.5
    assert torch.equal(found(x, 6, method), found(x * lengths, 6, method))


@pytest.mark.parametrize("remove", [4, 9])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_of_zeros_still_merge(method, remove):
    assert survivors(found(torch.zeros(2, 10, 4), remove, method)).tolist() == [10 - remove] * 2


@pytest.mark.parametrize("method", METHODS)
def test_where_everything_given_is_the_same_as_many_go(method):
    needs = {n: v if isinstance(v, tuple) else torch.zeros_like(v) for n, v in given(method).items()}
    choice = choose(torch.ones(3, 16, 8), 9, method, **needs)
    assert survivors(choice.parent).tolist() == [7] * 3
    assert choice.mixing is None or choice.mixing.isfinite().all()


def test_an_unknown_method_raises_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"method='pitme'.*pitome, tome, random"):
        parents(tokens(), 2, "pitme")


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_parameter_raises_with_the_ones_there_are(method):
    with pytest.raises(ValueError, match=rf"'{method}' has no parameter 'sharpness'; it takes"):
        parents(tokens(), 2, method, sharpness=1)


def test_an_unknown_energy_raises_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"energy='eq5'.*eq4, elu"):
        parents(tokens(), 2, energy="eq5")


@pytest.mark.parametrize("remove", [-1, 16, 17])
@pytest.mark.parametrize("method", METHODS)
def test_removing_more_than_there_are_raises_with_the_range(method, remove):
    with pytest.raises(ValueError, match=rf"remove={remove} .*0 to 15"):
        parents(tokens(), remove, method)


@pytest.mark.parametrize("method", [m for m, found in METHODS.items() if found.needs])
def test_what_is_needed_and_was_not_given_is_named(method):
    needs = given(method)
    name = METHODS[method].needs[0]
    with pytest.raises(ValueError, match=rf"method '{method}' needs {name}, which was not given"):
        parents(tokens(), 2, method, **{n: v for n, v in needs.items() if n != name})


@pytest.mark.parametrize("method", METHODS)
def test_what_is_given_and_not_needed_is_named(method):
    idle = next(name for name in METHOD_INPUTS if name not in METHODS[method].needs)
    with pytest.raises(ValueError, match=rf"method '{method}' has no use for {idle}; it needs"):
        parents(tokens(), 2, method, **given(method), **{idle: METHOD_INPUTS[idle]})


@pytest.mark.parametrize("method, entry", METHODS.items())
def test_an_entry_says_what_can_be(method, entry):
    assert entry.find is not None
    assert set(entry.needs) <= set(METHOD_INPUTS)
    assert entry.places
    assert set(entry.places) <= set(PLACES)
    assert not (entry.halves and entry.needs)  # a later round would be given what was there before the first
    assert not (entry.halves and (entry.kept or entry.mixed))  # rounds cannot be put together
    assert ("received_attention" in entry.needs or "last_attention" in entry.needs) <= (
        entry.places == ("decoder",)
    )


@pytest.mark.parametrize("shape", [(16,), (16, 8), (1, 2, 16, 8)])
def test_a_metric_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match="metric has shape"):
        parents(torch.zeros(shape), 1)


def test_method_files_import_only_torch_and_each_other():
    files = [f for f in Path(package.__file__).parent.glob("*.py") if f.name != "__init__.py"]
    siblings = {f.stem for f in files}
    assert siblings >= {found.find.__module__.split(".")[-1] for found in METHODS.values()}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in ("torch", "math") for alias in node.names), file
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                if node.module == package.__name__:
                    assert {alias.name for alias in node.names} <= siblings, file
                elif node.module.startswith(package.__name__):
                    assert node.module.removeprefix(f"{package.__name__}.") in siblings, file
                else:
                    assert node.module.split(".")[0] == "torch", file
