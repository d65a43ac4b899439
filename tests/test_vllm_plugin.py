"""The parts of the vLLM plugin that need no vLLM: what is refused, the server's arguments, weight names."""

import itertools
import json

import pytest
import torch
from conftest import make_model, make_vip_llava
from safetensors.torch import load_file
from tiled import make_tiled, make_tiled_processor, noise

from llava_pitome import MergeConfig, embedded, merge_tokens
from llava_pitome.cli.options import parse
from llava_pitome.integrations.vllm import validation, weight_names
from llava_pitome.integrations.vllm.serve_command import OPTIONS, chat_template, main, server_arguments
from llava_pitome.integrations.vllm.tiled_counts import TiledCounts
from llava_pitome.models.checkpoints import read_config


def arguments(*words):
    return server_arguments(parse(words, OPTIONS))


def values_of(words, flag, count=1):
    start = words.index(flag) + 1
    return words[start : start + count]


def merge_fields(*words):
    return json.loads(values_of(arguments(*words), "--hf-overrides")[0])["token_merging"]


# What vLLM can merge


@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(ratio=0.9),
        MergeConfig(tokens=30, prefix_share=0.5),
        MergeConfig.recipe("released", ratio=0.9),
        MergeConfig(resize=(9, 10)),
        MergeConfig(decoder={0: 1.0}),  # merges nothing
    ],
)
def test_merging_before_the_language_model_is_supported(config):
    validation.check(config, read_config(embedded.NAME))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder": {1: 0.5}}, "decoder="),
        ({"ratio": 0.9, "llm_proportional": True}, "llm_proportional=True"),
        ({"ratio": 0.9, "positions": "original"}, "positions='original'"),
        ({"tokens": 197}, "tokens=197 does not fit"),
        ({"ratio": (0.9, 0.8)}, "ratio holds 2 shares"),
        ({"resize": (15, 3)}, "resize="),
    ],
)
def test_a_config_that_vllm_cannot_merge_by_or_that_does_not_fit_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        validation.check(MergeConfig(**fields), read_config(embedded.NAME))


TILES_LIMIT = "not supported under vLLM, where images merge and videos do not"


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decoder": {1: 0.5}}, "decoder="),
        ({"ratio": 0.9, "llm_proportional": True}, "llm_proportional=True"),
        ({"ratio": 0.9, "positions": "original"}, "positions='original'"),
        ({"ratio": 0.9, "temporal": True}, f"temporal=True is {TILES_LIMIT}"),
        ({"ratio": 0.9, "tokens_per_video": 9}, f"tokens_per_video=9 is {TILES_LIMIT}"),
        ({"tokens_per_frame": 9}, f"tokens_per_frame=9 is {TILES_LIMIT}"),
        ({"tokens_per_tile": 37}, "tokens_per_tile=37 does not fit"),
        ({"tokens": 10**4}, "no image fits: tokens=10000 does not fit"),
        ({"tokens": 1}, "no image fits: tokens=1 does not fit"),
        ({"ratio": (0.9, 0.8)}, "ratio holds 2 shares"),
        ({"resize": (3, 4)}, "resize="),
    ],
)
def test_what_vllm_cannot_merge_in_images_of_tiles_raises(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        validation.check(MergeConfig(**fields), make_tiled(kind).config)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: make_tiled("next-video"), "'llava_next_video' is not supported under vLLM"),
        (make_vip_llava, "'vipllava' is not supported under vLLM"),
        (
            lambda: make_tiled("next-vicuna", vision_feature_layer=[-2, -3]),
            r"vision_feature_layer=\[-2, -3\]",
        ),
        (lambda: make_tiled("onevision", vision_aspect_ratio="pad"), "vision_aspect_ratio='pad'"),
    ],
)
def test_a_model_that_vllm_cannot_merge_raises(make, message):
    with pytest.raises(ValueError, match=message):
        validation.check(MergeConfig(ratio=0.9), make().config)


@pytest.mark.parametrize("name, value", [("newlines", "none"), ("tile_shares", "equal"), ("temporal", True)])
def test_fields_for_tiles_raise_for_a_model_without_them(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
        validation.check(MergeConfig(ratio=0.9, **{name: value}), read_config(embedded.NAME))


SIZES = [
    (1, 1),
    (2000, 300),
    (300, 2000),
    (1, 900),
    (900, 1),
    (48, 48),
    *((n, 211 - n) for n in range(7, 205, 6)),
]


@pytest.mark.parametrize("kind", ["next-vicuna", "next-mistral", "onevision", "onevision-odd"])
@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 1.0},
        {"ratio": 0.9},
        {"tokens": 30},
        {"tokens_per_tile": 5, "newlines": "scaled"},
        {"prefix": 0.3},
    ],
)
def test_placeholders_of_tiles_are_those_of_transformers(kind, fields):
    model, processor, config = make_tiled(kind), make_tiled_processor(kind), MergeConfig(**fields)
    counts, several = TiledCounts.of(model.config, config), kind.startswith("onevision")
    images = [noise(*size) for size in SIZES]
    rows = [[image] for image in images] + [images[:3]]
    with merge_tokens(model, config, processor):
        ids = processor(images=rows, text=["<image>" * len(row) for row in rows], padding=True)["input_ids"]
    written = [row.count(model.config.image_token_id) for row in ids]
    assert [counts.tokens(*size) for size in SIZES] == written[:-1]
    assert sum(counts.tokens(*size, is_alone=not several) for size in SIZES[:3]) == written[-1]


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision", "onevision-odd"])
@pytest.mark.parametrize("fields", [{"ratio": 1.0}, {"ratio": 0.9}, {"prefix": 0.3}, {"tokens_per_tile": 7}])
def test_no_image_has_more_placeholders_than_the_largest(kind, fields):
    counts = TiledCounts.of(make_tiled(kind).config, MergeConfig(**fields))
    sizes = itertools.product(range(1, 400, 9), range(1, 400, 13))
    assert max(counts.tokens(*size) for size in sizes) <= counts.tokens(*counts.largest_image())


def test_the_largest_image_is_one_that_the_budget_fits():
    counts = TiledCounts.of(make_tiled("onevision").config, MergeConfig(tokens=100))
    with pytest.raises(ValueError, match="tokens=100 does not fit"):
        counts.tokens(1, 900)
    assert counts.tokens(*counts.largest_image()) == 100


def test_an_unknown_tower_raises():
    config = read_config(embedded.NAME)
    config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="'pixtral' is not supported"):
        validation.check(MergeConfig(ratio=0.9), config)


def test_a_siglip_tower_without_its_first_patch_merges_in_the_tower_alone():
    config = make_model("siglip").config
    config.vision_feature_select_strategy = "default"
    validation.check(MergeConfig(ratio=0.9), config)
    with pytest.raises(ValueError, match="drops the first patch"):
        validation.check(MergeConfig(prefix=0.5), config)


def test_a_config_without_token_merging_has_no_merge_config():
    config = read_config(embedded.NAME)
    assert validation.merge_config(config) is None
    config.token_merging = "0.9"
    with pytest.raises(ValueError, match="must be a dict"):
        validation.merge_config(config)


# The command


@pytest.mark.parametrize(
    "words, config",
    [
        ([], MergeConfig(ratio=0.9)),
        (["tokens=64", "method=tome"], MergeConfig(tokens=64, method="tome")),
        (["prefix=0.5"], MergeConfig(prefix=0.5)),
        (['merging={"prefix": 0.5}'], MergeConfig(prefix=0.5)),
        (["recipe=released", "ratio=0.8"], MergeConfig.recipe("released", ratio=0.8)),
        (["recipe=released"], MergeConfig.recipe("released", ratio=0.9)),
    ],
)
def test_the_keys_make_the_merge_config(words, config):
    assert merge_fields(*words) == config.to_dict()


def test_a_saved_merge_config_is_used_unless_keys_give_another(model, processor, tmp_path):
    model.config.token_merging = MergeConfig(tokens=5).to_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no processor that can be loaded"):
        arguments(f"model={tmp_path}")
    processor.save_pretrained(tmp_path)
    assert merge_fields(f"model={tmp_path}") == MergeConfig(tokens=5).to_dict()
    assert merge_fields(f"model={tmp_path}", "tokens=7") == MergeConfig(tokens=7).to_dict()
    assert merge_fields(f"model={tmp_path}", "plain=true", f"output={tmp_path}/copies") is None


def test_the_server_is_local_and_fetches_from_the_given_domains_alone():
    words = arguments("vllm=--max-model-len 512", "port=8123")
    assert values_of(words, "--host") + values_of(words, "--port") == ["127.0.0.1", "8123"]
    assert values_of(words, "--allowed-media-domains")[0].endswith(".invalid")
    assert words[-2:] == ["--max-model-len", "512"]
    words = arguments("domains=a.example,b.example")
    assert values_of(words, "--allowed-media-domains", 2) == ["a.example", "b.example"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["ratio=2"], "ratio='2' is not allowed"),
        (["rato=0.9"], "did you mean 'ratio'?"),
        (["port=70000"], "port='70000' is not allowed"),
        (["vllm=--port=1"], "vllm='--port' is not allowed"),
        (["vllm=--hf_overrides {}"], "vllm='--hf-overrides' is not allowed"),
        (["plain=true", "ratio=0.9"], "plain=true serves without merging"),
        (["plain=true", "recipe=paper"], "plain=true serves without merging"),
        (["recipe=best", "tokens=20"], "is not supported under vLLM"),
        (["decoder=1:0.5"], "is not supported under vLLM"),
        (["ratio=0.9", 'merging={"ratio": 0.8}'], "ratio is given in merging and beside it"),
        (["model=/nowhere/at/all"], "is neither a folder with a model nor a model on the hub"),
        (["model=ADAPTER"], "is an adapter"),
    ],
)
def test_a_refused_key_ends_the_command_with_2(words, message, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "embedded"}')
    assert main([*(word.replace("ADAPTER", str(tmp_path)) for word in words), "dry_run=true"]) == 2
    assert message in capsys.readouterr().err


def test_an_original_checkpoint_is_refused(original_folder, capsys):
    assert main([f"model={original_folder}", "dry_run=true"]) == 2
    assert "`llava-pitome convert` writes a folder to serve" in capsys.readouterr().err


def test_chat_templates_write_the_bos_token(tmp_path):
    from transformers import AutoProcessor

    (template,) = values_of(arguments(), "--chat-template")
    processor = AutoProcessor.from_pretrained(embedded.PATH)
    assert template == "<s>" + processor.chat_template
    assert "--chat-template" not in arguments("vllm=--chat-template other.jinja")[:-2]
    processor.chat_template = template
    processor.save_pretrained(tmp_path)
    assert chat_template(str(tmp_path)) is None  # it writes the token already


def test_a_model_of_tiles_is_served_merging(tmp_path):
    make_tiled("next-vicuna").save_pretrained(tmp_path)
    make_tiled_processor("next-vicuna").save_pretrained(tmp_path)
    assert (
        merge_fields(f"model={tmp_path}", "tokens=30", "tile_shares=equal")
        == MergeConfig(tokens=30, tile_shares="equal").to_dict()
    )


# Weight names


def test_a_copy_has_old_names_and_the_same_weights(tmp_path):
    copy = weight_names.copy_with_old_names(embedded.PATH, tmp_path / "copy")
    assert weight_names.has_new_names(embedded.PATH) and not weight_names.has_new_names(copy)
    before, after = load_file(embedded.PATH / "model.safetensors"), load_file(copy / "model.safetensors")
    assert len(before) == len(after)
    for name, x in before.items():
        assert torch.equal(after[name.replace("vision_tower.", "vision_tower.vision_model.")], x)
    assert (copy / "config.json").read_bytes() == (embedded.PATH / "config.json").read_bytes()
    again = weight_names.copy_with_old_names(copy, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == after.keys()
    with pytest.raises(ValueError, match="the checkpoint itself"):
        weight_names.copy_with_old_names(copy, copy)


def test_a_copy_in_shards_has_their_index(model, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    copy = weight_names.copy_with_old_names(tmp_path / "shards", tmp_path / "copy")
    index = json.loads((copy / weight_names.INDEX).read_text())["weight_map"]
    shards = {name: shard.name for shard in copy.glob("*.safetensors") for name in load_file(shard)}
    assert index == shards and any(name.startswith(weight_names.OLD) for name in index)
