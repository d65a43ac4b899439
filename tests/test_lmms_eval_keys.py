"""The keys of lmms-eval's --model_args: typos name the nearest key before any model is loaded."""

import lmms_eval.models  # noqa: F401  # it finds the model by its entry point, and must be complete by then
import pytest

from llava_pitome.config import MergeConfig
from llava_pitome.integrations import lmms_eval as integration
from llava_pitome.integrations.lmms_eval import FIELDS, LOADING, LlavaPitome

ADDED = {"batch_size": 1, "max_batch_size": None, "device": None}  # by lmms-eval
OWN = (
    "pretrained", "recipe", "merging", "batch_size", "device", "dtype", "quantization", "blank",
    "thumbnail", "frames", "journal",
)  # fmt: skip


class Loaded(Exception):
    """Raised instead of loading a model."""


@pytest.fixture(autouse=True)
def loads(monkeypatch):
    """What a model would be loaded with."""
    found = []

    def load(path, config, **options):
        found.append((path, config, options))
        raise Loaded

    monkeypatch.setattr(integration, "load", load)
    return found


def make(text):
    return LlavaPitome.create_from_arg_string(text, ADDED)


def misspelt(key):
    middle = len(key) // 2
    return {key[:middle] + key[middle + 1 :], key[:middle] + key[middle] + key[middle:], f"{key}_"} - {key}


@pytest.mark.parametrize("key", sorted({*OWN, *FIELDS, *LOADING}))
def test_a_misspelt_key_names_the_nearest(key, loads):
    for typo in misspelt(key):
        with pytest.raises(ValueError, match=f"no key '{typo}'; the nearest is '{key}'"):
            make(f"ratio=0.9,{typo}=1")
    assert not loads


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('merging={"ratoi":0.9}', "no field 'ratoi'; the nearest is 'ratio'"),
        ('ratio=0.9,merging={"sight":"block"}', "no field 'sight'; the nearest is 'site'"),
        ('ratio=0.9,merging={"parameters":{"energie":"elu"}}', "'energie'; .*the nearest is 'energy'"),
        ('ratio=0.9,parameters={"candidate":3}', "'candidate'; .*the nearest is 'candidates'"),
        ('decoder={"one":0.5}', "decoder names layer 'one'"),
        ("ratio=0.9,merging=site", "merging='site' is not allowed: it must be a dict"),
        ('merging={"ratio":0.9', "is not JSON"),
        ('ratio=0.9,merging={"ratio":0.8}', "ratio is given in merging and beside it"),
        ('prefix=9,merging={"prefix":8}', "prefix is given in merging and beside it"),
        ("ratio=0.9,recipe=bset", "recipe='bset' is unknown; allowed are"),
        ("ratio=0.9,method=pitme", "method='pitme' is unknown; allowed are"),
        ("site=block", "says how to merge but not how far"),
    ],
)
def test_a_misspelt_value_is_refused_before_loading(text, message, loads):
    with pytest.raises(ValueError, match=message):
        make(text)
    assert not loads


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("ratio=0.9", MergeConfig(ratio=0.9)),
        ("ratio=[0.9,0.8]", MergeConfig(ratio=(0.9, 0.8))),
        ("recipe=best,tokens=20", MergeConfig.recipe("best", tokens=20)),
        ("prefix=9", MergeConfig(prefix=9)),
        ('decoder={"1":0.5},positions=original', MergeConfig(decoder={1: 0.5}, positions="original")),
        ("resize=[3,4]", MergeConfig(resize=(3, 4))),
        ("ratio=0.9,proportional=false", MergeConfig(ratio=0.9, proportional=False)),
        ('merging={"tokens":9,"site":"block"}', MergeConfig(tokens=9, site="block")),
        ("dtype=float32", MergeConfig(ratio=1.0)),  # however it was saved to merge
    ],
)
def test_every_field_is_a_key(text, config, loads):
    with pytest.raises(Loaded):
        make(f"pretrained=folder,attn_implementation=eager,{text}")
    ((path, found, options),) = loads
    assert (path, found, options["attn_implementation"]) == ("folder", config, "eager")
    assert not set(options) - {"attn_implementation", "device_map", "dtype", "quantization"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("device_map=auto", {"device_map": "auto"}),
        ("device_map=auto,quantization=4bit", {"device_map": "auto", "quantization": "4bit"}),
        ('device_map={"":"cpu"}', {"device_map": {"": "cpu"}}),
        (
            'device_map=balanced,max_memory={"0":"2GiB","cpu":"9GiB"}',
            {"device_map": "balanced", "max_memory": {0: "2GiB", "cpu": "9GiB"}},
        ),
        (
            "device_map=sequential,offload_folder=out,offload_buffers=True",
            {"device_map": "sequential", "offload_folder": "out", "offload_buffers": True},
        ),
        (
            'device_map={"":"disk"},offload_folder=out',
            {"device_map": {"": "disk"}, "offload_folder": "out"},
        ),
        ("device=cpu", {"device_map": "cpu"}),
        ("device=cpu,quantization=8bit", {"device_map": "cpu", "quantization": "8bit"}),
        ("device=cuda:1,quantization=8bit", {"device_map": "cuda:1", "quantization": "8bit"}),
    ],
)
def test_what_places_the_model_reaches_the_loading(text, expected, loads):
    with pytest.raises(Loaded):
        make(text)
    assert loads[0][2] == {"dtype": "auto", "quantization": None} | expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("device=cpu,device_map=auto", "device='cpu' and device_map='auto' both place the model"),
        ('device_map={"":"cpu"},device=cpu', "both place the model"),
        ('max_memory={"0":"2GiB"}', "max_memory=.* has no effect with device_map=None; allowed are auto"),
        ('device_map=cpu,max_memory={"0":"2GiB"}', "has no effect with device_map='cpu'"),
        ('device_map={"":"cpu"},max_memory={"0":"2GiB"}', "has no effect with device_map={'': 'cpu'}"),
        ("offload_folder=out", "offload_folder='out' has no effect with device_map=None; .*or a dict"),
        ("device=cpu,offload_buffers=True", "offload_buffers=True has no effect"),
        ("device_map=auto,max_memory=2GiB", "max_memory='2GiB' is not allowed: it must be a dict"),
        ("device_map={auto}", "device_map='{auto}' is not JSON"),
    ],
)
def test_places_that_contradict_or_have_no_effect_are_refused(text, message, loads):
    with pytest.raises(ValueError, match=message):
        make(text)
    assert not loads
