import copy
import dataclasses
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch

from llava_pitome import METHODS, MergeConfig
from llava_pitome.config import RECIPES, requested
from llava_pitome.models import adapters


@pytest.mark.parametrize(
    "ratio", [0, -0.1, 1.01, 2, math.nan, math.inf, True, False, "0.9", (0.9, 0.0), (0.9, True)]
)
def test_a_ratio_outside_0_and_1_raises_with_the_value(ratio):
    with pytest.raises(ValueError, match=r"ratio=.*\(0, 1\]") as error:
        MergeConfig(ratio=ratio)
    assert repr(ratio) in str(error.value)


def test_no_ratio_for_no_layer_raises():
    with pytest.raises(ValueError, match=r"ratio=\(\)"):
        MergeConfig(ratio=())


@pytest.mark.parametrize("ratio", [1, 1.0, 0.9, 1e-6, (0.9, 1, 0.5)])
def test_a_ratio_in_0_and_1_is_taken(ratio):
    assert MergeConfig(ratio=ratio).ratio == ratio


@pytest.mark.parametrize("tokens", [0, -5, True, 64.0, "64"])
def test_tokens_that_are_no_positive_whole_number_raise_with_the_value(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens!r} is not allowed"):
        MergeConfig(tokens=tokens)


@pytest.mark.parametrize("both", [{}, {"ratio": 0.9, "tokens": 64}])
def test_ratio_and_tokens_together_or_neither_raise(both):
    with pytest.raises(ValueError, match=r"ratio.* tokens"):
        MergeConfig(**both)


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("method", "pitme", "pitome, tome, random"),
        ("early_method", "tomme", "pitome, tome, random"),
        ("metric", "values", "keys, hidden"),
        ("site", "mlp", "attention, block"),
        ("order", "shuffled", "raster, method"),
        ("size_weighted", 1, "True or False"),
        ("proportional", None, "True or False"),
        ("early_depth", 1.5, r"\[0, 1\]"),
        ("early_depth", -0.5, r"\[0, 1\]"),
        ("parameters", {"margn": 0.5}, "margin, start, end, alpha, energy, candidates, split"),
        ("parameters", {"depth": 0.5}, "no parameter 'depth'"),
    ],
)
def test_a_value_out_of_range_raises_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=allowed):
        MergeConfig(ratio=0.9, **{field: value})


@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].has_order])
def test_an_order_that_the_method_lacks_raises(method):
    with pytest.raises(ValueError, match=f"'{method}' defines no order"):
        MergeConfig(ratio=0.9, method=method, order="method")


def test_a_parameter_of_another_method_raises():
    with pytest.raises(ValueError, match="'tome' has no parameter 'margin'"):
        MergeConfig(ratio=0.9, method="tome", parameters={"margin": 0.5})


@pytest.mark.parametrize("parameters", [{"energy": "eq5"}, {"margin": "high"}, {"alpha": None}])
def test_a_parameter_whose_value_the_method_cannot_use_raises_where_it_is_made(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        MergeConfig(ratio=0.9, parameters=parameters)


@pytest.mark.parametrize("change", [
    lambda d: d.update(alpha=7.0), lambda d: d.pop("energy"), lambda d: d.clear(),
    lambda d: d.setdefault("a", 1), lambda d: d.__setitem__("alpha", 7.0),
    lambda d: d.__delitem__("energy"), lambda d: d.__ior__({"alpha": 7.0}),
])  # fmt: skip
def test_the_dicts_of_a_config_cannot_change(change):
    config = MergeConfig.recipe("released", ratio=0.9)
    with pytest.raises(TypeError, match="cannot change"):
        change(config.parameters)
    assert config.parameters == RECIPES["released"]["parameters"] == {"energy": "elu"}


def test_a_config_has_no_part_in_what_it_was_made_of():
    parameters, decoder = {"alpha": 0.5}, {1: 0.5}
    config = MergeConfig(parameters=parameters, decoder=decoder)
    parameters["alpha"], decoder[2] = 7.0, 0.5
    assert config.parameters == {"alpha": 0.5} and config.decoder == {1: 0.5}


def test_equal_configs_have_one_hash_and_others_do_not():
    first = MergeConfig(decoder={8: 0.5, 4: 0.5}, parameters={"alpha": 0.5, "margin": 0.1})
    second = MergeConfig(decoder={4: 0.5, 8: 0.5}, parameters={"margin": 0.1, "alpha": 0.5})
    assert len({first, second, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)}) == 1
    assert len({first, MergeConfig(decoder={4: 0.5}), MergeConfig(ratio=0.9)}) == 3


@pytest.mark.parametrize("values", [{"prefix": 1}, {"decoder": {3: 1}}])
def test_the_whole_number_1_is_ambiguous(values):
    with pytest.raises(ValueError, match=r"=1 is ambiguous: give 1\.0 to keep every token"):
        MergeConfig(**values)


def test_configs_of_version_1_load():
    old = {"version": 1, "prefix": 1, "decoder": {"8": 1, "4": 0.5}, "ratio": 0.9}
    config = MergeConfig.from_dict(old)
    assert config.tokens_at(576, 23) == 1
    assert config.decoder[4] == 0.5 and config.llm_lengths(64, 12)[-1] == 1
    assert MergeConfig.from_dict({"version": 1, "prefix": 64}) == MergeConfig(prefix=64)


def test_a_saved_config_comes_back(tmp_path):
    config = MergeConfig.recipe("best", tokens=64)
    config.save_pretrained(tmp_path / "new")
    assert MergeConfig.from_pretrained(tmp_path / "new") == config
    (tmp_path / "config.json").write_text(json.dumps({"token_merging": config.to_dict()}))
    assert MergeConfig.from_pretrained(tmp_path) == config
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no merge config"):
        MergeConfig.from_pretrained(tmp_path)


def test_the_defaults_of_a_version_stay_as_they_are():
    """Tags of model cards leave them out: another default is another version, which `from_dict` converts."""
    assert MergeConfig(tokens=9).to_dict() == {
        "version": 2, "ratio": None, "tokens": 9, "tokens_per_tile": None, "tokens_per_frame": None,
        "tokens_per_video": None, "prefix": None, "decoder": {}, "resize": None,
        "method": "pitome", "parameters": {}, "early_method": None, "early_depth": 0.0, "metric": "keys",
        "size_weighted": True, "order": "raster", "site": "attention", "proportional": True,
        "depths": [0.0, 1.0], "prefix_share": 0.0, "prefix_metric": None, "newlines": "rows",
        "tile_shares": "area", "across_tiles": True, "temporal": False, "llm_proportional": False,
        "positions": "packed",
    }  # fmt: skip


def test_every_field_has_one_description():
    for field in dataclasses.fields(MergeConfig):
        assert field.metadata["help"] and field.metadata["group"]
        assert f"{field.name}: {field.metadata['help']}" in MergeConfig.__doc__


def test_an_unknown_field_raises_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no field 'propotional'; the nearest is 'proportional'"):
        MergeConfig.from_dict({"ratio": 0.9, "propotional": False})
    with pytest.raises(ValueError, match=r"no field 'ratios'; the nearest is 'ratio'"):
        MergeConfig.recipe("paper", ratios=0.9)


def test_another_version_raises():
    with pytest.raises(ValueError, match="version 99"):
        MergeConfig.from_dict(MergeConfig(ratio=0.9).to_dict() | {"version": 99})


def test_an_unknown_recipe_raises_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"recipe='papr' .*paper, released"):
        MergeConfig.recipe("papr", ratio=0.9)


CONFIGS = (
    MergeConfig(ratio=0.9),
    MergeConfig(ratio=(0.9, 0.5, 1.0)),
    MergeConfig(tokens=64, method="random", parameters={"seed": 3}),
    MergeConfig(
        ratio=0.8, parameters={"margin": 0.3, "energy": "elu"}, early_method="tome", early_depth=0.25
    ),
    MergeConfig.recipe("paper", ratio=0.95),
    MergeConfig.recipe("released", tokens=17),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_survives_json(config):
    values = config.to_dict()
    assert values["version"] == 2
    assert MergeConfig.from_dict(values) == config
    assert MergeConfig.from_dict(json.loads(json.dumps(values))) == config


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        MergeConfig(ratio=0.9).ratio = 0.8


def test_reading_a_dict_leaves_it_as_it_was():
    values = MergeConfig(ratio=0.9).to_dict()
    before = json.dumps(values)
    MergeConfig.from_dict(values)
    assert json.dumps(values) == before


def test_the_paper_is_the_default():
    assert MergeConfig.recipe("paper", ratio=0.9) == MergeConfig(ratio=0.9)
    config = MergeConfig(ratio=0.9)
    assert (config.method, config.metric, config.site, config.order) == (
        "pitome",
        "keys",
        "attention",
        "raster",
    )
    assert config.size_weighted and config.proportional


def test_released_is_what_the_authors_branch_computes():
    config = MergeConfig.recipe("released", ratio=0.9)
    assert [config.method_at(i / 24)[0] for i in range(24)] == ["tome"] * 13 + ["pitome"] * 11
    assert config.method_at(13 / 24)[1] == {"energy": "elu"}
    assert (config.metric, config.site, config.order) == ("hidden", "block", "method")
    assert not config.size_weighted and not config.proportional


def test_a_recipe_takes_changes():
    assert not MergeConfig.recipe("released", ratio=0.9, order="raster").proportional
    assert MergeConfig.recipe("released", ratio=0.9, order="raster").order == "raster"


def test_early_parameters_stay_with_their_method():
    config = MergeConfig(ratio=0.9, parameters={"margin": 0.1}, early_method="tome", early_depth=0.5)
    assert config.method_at(0.4) == ("tome", {})
    assert config.method_at(0.5) == ("pitome", {"margin": 0.1})


def test_lengths_follow_ratio_ratios_and_tokens():
    assert MergeConfig(ratio=0.5).lengths(36, 3) == (36, 18, 9, 5)
    assert MergeConfig(ratio=(1.0, 0.5, 0.5)).lengths(36, 3) == (36, 36, 18, 9)
    assert MergeConfig(tokens=7).lengths(36, 3)[-1] == 7


def test_lengths_that_do_not_fit_the_tower_raise():
    with pytest.raises(ValueError, match="2 shares; the tower has 3 layers"):
        MergeConfig(ratio=(0.9, 0.5)).lengths(36, 3)
    with pytest.raises(ValueError, match="tokens=37"):
        MergeConfig(tokens=37).lengths(36, 3)


@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(ratio=0.9),
        MergeConfig(ratio=(0.9, 0.8), depths=(0.0, 1.0)),
        MergeConfig(decoder={8: 0.5}),
        MergeConfig.recipe("released", tokens=20),
        MergeConfig.recipe("best", tokens=20, prefix_share=0.0),
    ],
)
def test_changes_are_what_makes_a_config(config):
    changes = json.loads(json.dumps(config.changes()))
    assert MergeConfig.from_dict(changes) == config
    plain = MergeConfig(ratio=0.5, tokens=None).to_dict() | {"ratio": None}
    assert all(plain[name] != value for name, value in changes.items())


def test_a_plain_config_changes_nothing_else():
    assert MergeConfig(ratio=0.9).changes() == {"ratio": 0.9}


@pytest.mark.parametrize("key", [1, None, 0.9, True, (), ("ratio",), b"ratio", ""])
def test_a_key_that_is_no_name_is_refused_with_the_nearest(key):
    with pytest.raises(ValueError, match=rf"no field {re.escape(repr(key))}; the nearest is "):
        MergeConfig.from_dict({key: 0.9})
    with pytest.raises(
        ValueError, match=rf"no parameter {re.escape(repr(key))}; it takes .*; the nearest is"
    ):
        MergeConfig(ratio=0.9, parameters={key: 0.7})
    with pytest.raises(ValueError, match=rf"no field {re.escape(repr(key))}"):
        requested("paper", {"ratio": 0.9}, {key: 0.9})


@pytest.mark.parametrize("name", [["best"], {"best": 1}, {"best"}, None, 1, ("best",), "Best"])
def test_a_recipe_of_another_type_raises_with_the_ones_there_are(name):
    with pytest.raises(ValueError, match=rf"recipe={re.escape(repr(name))} is unknown; allowed are paper"):
        MergeConfig.recipe(name, ratio=0.9)


@pytest.mark.parametrize("values", [None, [1], [["ratio", 0.9]], "ratio", 0.9, True])
def test_a_config_that_is_no_dict_is_refused(values):
    with pytest.raises(ValueError, match=rf"cannot be {re.escape(repr(values))}: it must be a dict"):
        MergeConfig.from_dict(values)


@pytest.mark.parametrize("version", [True, None, "2", [2], 0, 3, np.int64(3), np.array([1, 2])])
def test_a_version_that_is_not_known_raises(version):
    with pytest.raises(ValueError, match=r"token_merging has version .* reads versions 1 to 2"):
        MergeConfig.from_dict({"version": version, "ratio": 0.9})


@pytest.mark.parametrize("one", [1, np.int64(1), np.uint8(1), np.array(1), torch.tensor(1)], ids=repr)
@pytest.mark.parametrize("version", [1, np.int64(1)], ids=repr)
def test_the_1_of_version_1_is_one_token_whatever_its_type(version, one):
    config = MergeConfig.from_dict({"version": version, "prefix": one, "decoder": {"8": one, 4: 0.5}})
    assert config == MergeConfig.from_dict({"version": 1, "prefix": 1, "decoder": {"8": 1, "4": 0.5}})
    kept = MergeConfig.from_dict({"version": version, "prefix": np.float64(1), "decoder": {"8": np.int64(9)}})
    assert kept == MergeConfig(prefix=1.0, decoder={8: 9})


RECORDS = ("token_merging.json", "config.json", "adapter_config.json")
NO_DICTS = ["null", "[1]", "3", '"ratio"', "", "{", "\udcff\udcfe", "[" * 10**5, None]


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", NO_DICTS, ids=lambda content: str(content)[:9].encode(errors="replace"))
def test_a_file_that_holds_no_config_is_named(name, content, tmp_path):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    read = adapters.base_model if name == "adapter_config.json" else MergeConfig.from_pretrained
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))} (holds|is no file)"):
        read(str(tmp_path))


@pytest.mark.parametrize("values", [[1], 3, "ratio", {"ratoi": 0.9}, {"ratio": 2}])
def test_a_config_in_config_json_that_cannot_be_read_is_named(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"token_merging": values}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        MergeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("subfolder", [None, "", "inner"])
def test_a_config_is_read_from_a_subfolder_or_none(subfolder, tmp_path):
    MergeConfig(ratio=0.9).save_pretrained(tmp_path / (subfolder or ""))
    assert MergeConfig.from_pretrained(tmp_path, subfolder=subfolder) == MergeConfig(ratio=0.9)
