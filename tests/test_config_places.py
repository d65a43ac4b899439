import json
import math
from pathlib import Path

import pytest
from prompts import PROMPTS, batch, generate

from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.config import RECIPES

RESULTS = Path(__file__).parents[1] / "eval" / "results"


@pytest.mark.parametrize(
    "values, message",
    [
        *(({"prefix": v}, rf"prefix={v!r} is not allowed: .*share in \(0, 1\]")
          for v in (0, 0.0, -0.5, 1.5, True, False, math.nan, math.inf, "half", -3)),
        *(({"decoder": {3: v}}, rf"decoder\[3\]={v!r} is not allowed: .*share in \(0, 1\]")
          for v in (0, 0.0, -0.5, 1.5, True, None, math.nan, "half", -3)),
        *(({"decoder": {k: 0.5}}, rf"decoder names layer {k!r}; .*from 0")
          for k in (-1, "-1", "x", 1.5, True, None, "")),
        ({"decoder": {8: 0.5, "8": 0.3}}, "decoder names layer 8 twice"),
        *(({"decoder": v}, "decoder=.* must be a dict") for v in ([8], (8, 0.5), "8", 0.5, None)),
        *(({"tokens": 9, "prefix_share": v}, f"prefix_share={v!r} is not allowed")
          for v in (-0.1, 1.1, True, "half", None, math.nan)),
        ({"ratio": (0.9, 0.8), "prefix_share": 0.5}, "prefix_share=0.5 divides what tokens"),
        ({"ratio": 0.9, "prefix": 7, "prefix_share": 0.5}, "prefix_share=0.5 divides what tokens"),
        ({"prefix": 7, "prefix_share": 0.5}, "prefix_share=0.5 divides what tokens"),
        ({"tokens": 9, "prefix": 0.5}, "tokens=9 .* prefix=0.5"),
        *(({"resize": v}, "resize=.* must be rows and columns")
          for v in ((4,), (4, 4, 4), (0, 4), (4, -1), (4.0, 4), (True, 4), 4, "44")),
        ({"prefix": 0.5, "prefix_metric": "values"}, "prefix_metric='values' is unknown.*features, keys"),
        *(({"ratio": 0.9, "llm_proportional": v}, f"llm_proportional={v!r} .*True or False")
          for v in (1, None, "yes")),
        ({}, "give one of ratio, tokens, tokens_per_tile, .*, resize"),
        ({"decoder": {}}, "nothing says how far"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_raises_with_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        MergeConfig(**values)


PLACES = {"tower": {"ratio": 0.9}, "prefix": {"prefix": 0.5}, "decoder": {"decoder": {0: 0.5}}}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_merges_where_its_definition_makes_sense_and_raises_elsewhere(
    method, place, model, processor, pictures
):
    if place not in METHODS[method].places:
        with pytest.raises(ValueError, match=f"'{method}' cannot merge in the {place}: it is defined for"):
            MergeConfig(method=method, **PLACES[place])
        MergeConfig(method=method, **{k: {0: 1.0} if k == "decoder" else 1.0 for k in PLACES[place]})
        return
    with merge_tokens(model, MergeConfig(method=method, **PLACES[place]), processor):
        assert generate(model, batch(processor, PROMPTS, pictures)).shape == (4, 6)


@pytest.mark.parametrize("values", [{"prefix": 0.5, "decoder": {0: 0.5}}, {"decoder": {0: 0.5, 1: 0.5}},
                                    {"prefix": 2, "decoder": {1: 3}}])  # fmt: skip
def test_a_grid_is_there_for_the_first_merge_only(values):
    with pytest.raises(ValueError, match="'grid' works on the grid of patches"):
        MergeConfig(method="grid", **values)
    MergeConfig(method="grid", prefix=1.0, decoder={0: 1.0, 1: 0.5, 2: 1.0})


@pytest.mark.parametrize("values", [{"ratio": 0.9, "prefix": 0.5}, {"tokens": 9, "prefix_share": 0.5}])
def test_a_grid_behind_a_tower_that_merges_raises(values):
    with pytest.raises(ValueError, match="'grid' cannot merge in the tower"):
        MergeConfig(method="grid", **values)
    with pytest.raises(ValueError, match="'grid'"):
        MergeConfig(method="grid", early_method="tome", early_depth=1.0, **values)


CONFIGS = [
    MergeConfig(prefix=2),
    MergeConfig(prefix=1.0),
    MergeConfig(prefix=0.25, prefix_metric="keys"),
    MergeConfig(decoder={16: 0.5, 8: 3, 0: 1.0}),
    MergeConfig(resize=(14, 16), ratio=(0.9, 0.5), llm_proportional=True),
    MergeConfig(tokens=9, prefix_share=0.25, depths=(0.25, 0.75)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_survives_json(config):
    found = MergeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert found == config
    assert repr(found) == repr(config)  # tuples are tuples, layers are numbers in order
    assert list(found.decoder) == sorted(found.decoder)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_ratio_that_is_divided_leaves_as_many_as_one_that_is_not(share):
    assert MergeConfig(ratio=0.9, prefix_share=share).tokens_at(576, 23) == 54
    assert MergeConfig(ratio=0.9).lengths(576, 23)[-1] == 54


def test_best_is_what_the_search_found():
    held = json.loads((RESULTS / "search.json").read_text())
    assert json.loads(held["path"][-1]) == RECIPES["best"]


@pytest.mark.parametrize(
    "changes, tokens",
    [({"ratio": 0.9}, 54), ({"tokens": 64}, 64), ({"prefix": 60}, 60), ({"decoder": {1: 5}}, 576),
     ({"resize": (9, 9)}, 81), ({"ratio": 0.9, "prefix": 9}, 9)],
)  # fmt: skip
def test_a_recipe_that_divides_a_budget_takes_every_amount(changes, tokens):
    assert MergeConfig.recipe("best", **changes).tokens_at(576, 23) == tokens
