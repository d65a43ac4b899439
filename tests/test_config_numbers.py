"""Numbers of numpy and torch in a config: it is the same as one made of Python's own."""

import copy
import json
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import make_model

from llava_pitome import METHODS, MergeConfig, apply, parents, remove
from llava_pitome.flops import closed_form
from llava_pitome.plain_values import plain
from llava_pitome.token_schedule import (
    common_ratio,
    kept_by_ratio,
    kept_tokens,
    lengths,
    lengths_for,
    tokens_between,
)

FLOATS = {
    "Fraction": lambda x: Fraction(str(x)) if np.isfinite(x) else np.float64(x),  # has no infinity
    "Decimal": lambda x: Decimal(str(x)),
    "object array": lambda x: np.array(x, dtype=object),
    "float32 in an object array": lambda x: np.array(np.float32(x), dtype=object),
    **{t.__name__: t for t in (np.float64, np.float32, np.float16, np.longdouble)},
    "array": np.array,
    "array32": lambda x: np.array(x, dtype=np.float32),
    "float64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
    "tensor": torch.tensor,
    "bfloat16 tensor": lambda x: torch.tensor(x, dtype=torch.bfloat16),
    "parameter": lambda x: torch.nn.Parameter(torch.tensor(x)),
}  # fmt: skip
INTEGERS = {
    **{t.__name__: t for t in (np.int64, np.int32, np.uint8, np.int8)},
    "array": np.array,
    "object array": lambda x: np.array(x, dtype=object),
    "int64 in an object array": lambda x: np.array(np.int64(x), dtype=object),
    **{str(t): lambda x, t=t: torch.tensor(x, dtype=t) for t in (torch.int64, torch.uint8)},
}  # fmt: skip
FLAGS = {"bool_": np.bool_, "array": np.array, "tensor": torch.tensor}


def key(x):
    """Returns a number that can be a dict's key; an array cannot."""
    return x[()] if isinstance(x, np.ndarray) else x


OF_FLOATS = {
    "ratio": lambda f: {"ratio": f(0.9)},
    "ratio of each layer": lambda f: {"ratio": [f(0.9), f(0.85), f(1.0)]},
    "prefix": lambda f: {"prefix": f(0.5)},
    "decoder": lambda f: {"decoder": {0: f(0.5), 1: f(1.0)}},
    "early_depth": lambda f: {"ratio": 0.9, "early_method": "tome", "early_depth": f(0.3)},
    "depths": lambda f: {"ratio": 0.9, "depths": (f(0.1), f(0.7))},
    "prefix_share": lambda f: {"tokens": 5, "prefix_share": f(0.3)},
    "parameters": lambda f: {"ratio": 0.9, "parameters": {"margin": f(0.3), "candidates": f(3.0)}},
}
OF_INTEGERS = {
    "tokens": lambda i: {"tokens": i(9)},
    "ratio": lambda i: {"ratio": i(1)},
    "prefix": lambda i: {"prefix": i(9)},
    "decoder": lambda i: {"decoder": {0: i(9), 1: 0.5}},
    "layers of the decoder": lambda i: {"decoder": {key(i(0)): 0.5, key(i(1)): 9}},
    "resize": lambda i: {"resize": (i(4), i(5))},
    "depths": lambda i: {"ratio": 0.9, "depths": (i(0), i(1))},
    "parameters": lambda i: {"prefix": 0.5, "method": "prumerge", "parameters": {"neighbours": i(3)}},
}
OF_FLAGS = {
    name: lambda b, name=name: {"ratio": 0.9, name: b(not MergeConfig(ratio=0.9).to_dict()[name])}
    for name in ("size_weighted", "proportional", "llm_proportional")
}
CASES = [
    pytest.param(make, kind, id=f"{name}-{kind_name}")
    for makes, kinds in ((OF_FLOATS, FLOATS), (OF_INTEGERS, INTEGERS), (OF_FLAGS, FLAGS))
    for name, make in makes.items()
    for kind_name, kind in kinds.items()
]


def types(value):
    """Returns the types of all numbers and names in a value."""
    if isinstance(value, dict):
        return set().union(*map(types, value), *map(types, value.values()))
    return set().union(*map(types, value)) if isinstance(value, tuple) else {type(value)}


@pytest.mark.parametrize("make, kind", CASES)
def test_a_config_of_foreign_numbers_is_the_plain_one(make, kind, tmp_path):
    config, expected = MergeConfig(**make(kind)), MergeConfig(**make(lambda x: x))
    assert types(vars(config)) <= {bool, int, float, str, type(None)}
    assert (config, hash(config), repr(config)) == (expected, hash(expected), repr(expected))
    assert json.dumps(config.to_dict()) == json.dumps(expected.to_dict())
    assert (config.changes(), copy.deepcopy(config)) == (expected.changes(), expected)
    assert pickle.loads(pickle.dumps(config)) == MergeConfig.from_dict(config.to_dict()) == expected
    config.save_pretrained(tmp_path)
    assert MergeConfig.from_pretrained(tmp_path) == expected


@pytest.mark.parametrize("array", [np.array, lambda x: np.array(x, dtype=np.float32), torch.tensor])
def test_arrays_are_tuples_of_numbers(array):
    assert MergeConfig(ratio=array([0.9, 0.85])) == MergeConfig(ratio=(0.9, 0.85))
    assert MergeConfig(ratio=0.9, depths=array([0.25, 0.7])) == MergeConfig(ratio=0.9, depths=(0.25, 0.7))
    assert MergeConfig.recipe("best", ratio=array([0.9, 0.8])) == MergeConfig.recipe("best", ratio=(0.9, 0.8))
    assert MergeConfig(
        resize=array([4, 5]).astype(int) if array is np.array else torch.tensor([4, 5])
    ).resize == (4, 5)


@pytest.mark.parametrize(
    "sides", [np.array([4, 5]), torch.tensor([4, 5]), torch.Size([4, 5]), [np.uint8(4), 5]]
)
def test_an_array_gives_the_sides_of_a_resize(sides):
    assert MergeConfig(resize=sides) == MergeConfig(resize=(4, 5))


@pytest.mark.parametrize("decimal", [0.9, 0.95, 0.1, 1e-6, 0.875, 1.0])
@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
def test_a_number_is_the_decimal_that_it_was_written_as(kind, decimal):
    assert repr(plain(kind(decimal))) == repr(decimal)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_number_is_the_decimal_that_numpy_prints(dtype):
    for x in np.random.default_rng(0).uniform(0, 1, 300).astype(dtype):
        assert plain(x) == plain(torch.tensor(x)) == float(str(x))
        assert dtype(plain(x)) == x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1.5])
@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("field", ["ratio", "prefix", "decoder", "early_depth", "prefix_share", "parameters"])
def test_foreign_numbers_out_of_range_raise(field, kind, value):
    allowed = {"early_depth": (0.0,), "prefix_share": (0.0,), "parameters": (0.0, 1.5)}
    if value in allowed.get(field, ()):
        return
    with pytest.raises(ValueError, match="not allowed"):
        MergeConfig(**OF_FLOATS[field](lambda _: kind(value)))


@pytest.mark.parametrize(
    "values",
    [
        {"ratio": np.complex64(0.9)},
        {"ratio": torch.tensor([[0.9]])},
        {"ratio": np.array("0.9")},
        {"ratio": torch.tensor(0.9, device="meta")},
        {"tokens": np.float64(64)},
        {"tokens": np.bool_(True)},
        {"tokens": Fraction(64)},
        {"tokens": Decimal(64)},
        {"prefix": Decimal(64)},
        {"resize": (Fraction(4), 4)},
        {"ratio": Fraction(10**400)},
        {"ratio": Decimal("sNaN")},
        {"ratio": Fraction(3, 2)},
        {"ratio": np.array("0.9", dtype=object)},
        {"ratio": np.array(print, dtype=object)},
        {"tokens": np.array([64])},
        {"tokens": torch.tensor([64])},
        {"prefix": torch.tensor([0.5])},
        {"prefix": np.bool_(True)},
        {"prefix": np.int64(1)},
        {"decoder": {np.float64(8.0): 0.5}},
        {"decoder": {np.bool_(True): 0.5}},
        {"decoder": {8: np.int64(1)}},
        {"decoder": {8: 0.5, torch.tensor(8): 0.7}},
        {"decoder": {torch.tensor(8): 0.5, "8": 0.7}},
        {"resize": np.array([4.0, 4.0])},
        {"ratio": 0.9, "proportional": np.int64(1)},
        {"ratio": 0.9, "parameters": {"margin": np.array([0.3])}},
        {"ratio": 0.9, "parameters": {"candidates": np.float32(1.5)}},
    ],
    ids=str,
)
def test_foreign_values_that_are_no_such_number_raise(values):
    with pytest.raises(ValueError):
        MergeConfig(**values)


def test_a_model_saves_the_config_that_numpy_made(tmp_path):
    model = make_model()
    apply(model, MergeConfig(ratio=np.float32(0.8), decoder={np.int64(0): np.float64(0.5)}))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["token_merging"]
    assert MergeConfig.from_dict(saved) == MergeConfig(ratio=0.8, decoder={0: 0.5})
    remove(model)


@pytest.mark.parametrize("kind", FLOATS.values(), ids=FLOATS)
def test_functions_that_take_numbers_take_foreign_ones(kind):
    x = torch.randn(2, 36, 8, generator=torch.Generator().manual_seed(0))
    expected = parents(x, 9, depth=0.3, alpha=0.7)
    assert torch.equal(parents(x, np.int64(9), depth=kind(0.3), alpha=kind(0.7)), expected)
    assert METHODS["pitome"](alpha=kind(0.7)) == METHODS["pitome"](alpha=0.7)
    for count in (np.int32(576), torch.tensor(576), np.uint8(200)):
        n = int(count)
        assert kept_by_ratio(count, kind(0.9)) == kept_by_ratio(n, 0.9)
        assert kept_tokens(count, kind(0.3), "prefix") == kept_tokens(n, 0.3, "prefix")
        assert lengths(n, (kind(0.9), kind(0.7))) == lengths(n, (0.9, 0.7))


def test_token_counts_of_foreign_sizes_are_plain():
    model, config = make_model(), MergeConfig.recipe("best", tokens=9)
    for patches in (np.int32(36), torch.tensor(36), np.array(36)):
        for found, expected in (
            (config.tokens_at(patches, np.int64(7)), config.tokens_at(36, 7)),
            (config.lengths(patches, np.int64(7)), config.lengths(36, 7)),
            (MergeConfig(ratio=1 / 3).lengths(patches, 7), MergeConfig(ratio=1 / 3).lengths(36, 7)),
            (MergeConfig(resize=(4, 4)).patches_at(patches), 16),
        ):
            assert found == expected
            assert types(found) == {int}
    both = [closed_form(model, config.lengths(n, 7), text=np.int64(5)) for n in (np.int64(36), 36)]
    assert both[0] == both[1]


BEST, HALF = MergeConfig.recipe("best", tokens=9), MergeConfig(ratio=0.5)
COUNTS = {  # functions of counts, each of which an argument of another type replaces
    "kept_by_ratio": (lambda n: kept_by_ratio(n, 0.9), (200,)),
    "kept_tokens of a share": (lambda n: kept_tokens(n, 0.9, "prefix"), (200,)),
    "kept_tokens of a number": (lambda n, m: kept_tokens(n, m, "prefix"), (120, 9)),
    "lengths": (lambda n: lengths(n, (0.9, 0.8)), (200,)),
    "lengths_for": (lambda n, m: lengths_for(n, (True,) * 5, m), (120, 9)),
    "lengths_for of all": (lambda n, m: lengths_for(n, (True,) * 5, m), (120, 120)),
    "common_ratio": (common_ratio, (120, 7, 9)),
    "tokens_between": (lambda n, m: tokens_between(n, m, 0.5), (120, 9)),
    "tokens_at": (BEST.tokens_at, (121, 7)),
    "tokens_of": (BEST.tokens_of, (121, 7)),
    "MergeConfig.lengths": (BEST.lengths, (121, 7)),
    "patches_at": (HALF.patches_at, (121,)),
    "patches_at of a resize": (MergeConfig(resize=(4, 4)).patches_at, (121,)),
    "prefix_length": (HALF.prefix_length, (20, 36, 7)),
    "prefix_length of a share": (MergeConfig(ratio=0.9, prefix_share=0.5).prefix_length, (20, 36, 7)),
    "llm_lengths": (MergeConfig(decoder={0: 0.5, 1: 9}).llm_lengths, (60, 4)),
    "llm_lengths of no merge": (HALF.llm_lengths, (60, 4)),
}
NARROW = {**{t.__name__: t for t in (np.int8, np.uint8, np.int16, np.int64)}, "tensor": torch.tensor}


def calls(of):
    """Every function of counts, with the arguments of one place at a time, and of all, made by `of`."""
    for name, (call, counts) in COUNTS.items():
        for chosen in [{i} for i in range(len(counts))] + [set(range(len(counts)))]:
            made = [of(x) if i in chosen else x for i, x in enumerate(counts)]
            yield f"{name} {sorted(chosen)}", call, counts, made


@pytest.mark.parametrize("kind", NARROW.values(), ids=NARROW)
def test_counts_of_narrow_integers_neither_overflow_nor_leak(kind):
    def narrow(x):
        return x if kind is np.int8 and x > 127 else kind(x)

    for name, call, counts, made in calls(narrow):
        found = call(*made)
        assert found == call(*counts), name
        assert types(found) <= {int, float}, name


FLOAT_LIKE = (float, np.float32, lambda x: torch.tensor(float(x)), Fraction, Decimal)  # an amount: a share


@pytest.mark.parametrize("of", [*FLOAT_LIKE, str, bool, lambda _: None, lambda x: [x]])
def test_counts_that_are_no_whole_numbers_are_refused(of):
    for name, call, _, made in calls(of):
        if name != "kept_tokens of a number [1]" or of not in FLOAT_LIKE:
            with pytest.raises(ValueError, match="is not allowed: it must be a whole number"):
                call(*made)
