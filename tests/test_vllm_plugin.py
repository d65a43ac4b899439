"""What of the vLLM plugin needs no vLLM: what is refused, the command's words, a checkpoint's names."""

import json

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from transformers import AutoProcessor

from llava_pitome import MergeConfig, embedded
from llava_pitome.cli.options import parse
from llava_pitome.integrations.vllm import chat, renamed, supported
from llava_pitome.integrations.vllm.serve import OPTIONS, command, main
from llava_pitome.models.checkpoints import configuration


def words(*given):
    return command(parse(given, OPTIONS))


def served(*given):
    """What `token_merging` a command gives to vLLM."""
    found = words(*given)
    return json.loads(found[found.index("--hf-overrides") + 1])["token_merging"]


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
def test_what_merges_in_front_of_the_language_model_can_be_served(config):
    supported.check(config, configuration(embedded.NAME))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"decoder": {1: 0.5}}, "decoder="),
        ({"ratio": 0.9, "llm_proportional": True}, "llm_proportional=True"),
        ({"ratio": 0.9, "positions": "original"}, "positions='original'"),
        ({"tokens": 197}, "tokens=197 does not fit"),
        ({"ratio": (0.9, 0.8)}, "ratio holds 2 shares"),
        ({"resize": (15, 3)}, "resize="),
    ],
)
def test_what_vllm_cannot_do_or_the_model_does_not_fit_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        supported.check(MergeConfig(**fields), configuration(embedded.NAME))


def test_a_tower_that_is_not_known_is_refused():
    config = configuration(embedded.NAME)
    config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="'pixtral'"):
        supported.check(MergeConfig(ratio=0.9), config)


def test_a_siglip_tower_that_drops_its_first_patch_merges_in_the_tower_alone():
    config = make_model("siglip").config
    config.vision_feature_select_strategy = "default"
    supported.check(MergeConfig(ratio=0.9), config)
    with pytest.raises(ValueError, match="drops the first patch"):
        supported.check(MergeConfig(prefix=0.5), config)


def test_a_config_without_token_merging_asks_for_nothing():
    config = configuration(embedded.NAME)
    assert supported.merging(config) is None
    config.token_merging = "0.9"
    with pytest.raises(ValueError, match="must be a dict"):
        supported.merging(config)


def test_the_command_says_how_to_merge():
    assert served() == MergeConfig(ratio=0.9).to_dict()
    assert served("tokens=64", "method=tome") == MergeConfig(tokens=64, method="tome").to_dict()
    assert served('merging={"prefix": 0.5}') == MergeConfig(prefix=0.5).to_dict()
    assert served("recipe=released", "ratio=0.8") == MergeConfig.recipe("released", ratio=0.8).to_dict()


def test_the_command_takes_up_what_a_checkpoint_was_saved_with(model, processor, tmp_path):
    model.config.token_merging = MergeConfig(tokens=5).to_dict()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no processor that can be loaded"):
        words(f"model={tmp_path}")
    processor.save_pretrained(tmp_path)
    assert served(f"model={tmp_path}") == MergeConfig(tokens=5).to_dict()
    assert served(f"model={tmp_path}", "tokens=7") == MergeConfig(tokens=7).to_dict()
    assert served(f"model={tmp_path}", "plain=true", f"output={tmp_path}/copies") is None


def test_the_server_listens_here_alone_and_fetches_nothing_unless_told():
    found = words("vllm=--max-model-len 512", "port=8123")
    assert found[found.index("--host") + 1] == "127.0.0.1" and found[found.index("--port") + 1] == "8123"
    assert found[found.index("--allowed-media-domains") + 1].endswith(".invalid")
    assert found[-2:] == ["--max-model-len", "512"]
    found = words("domains=a.example,b.example")
    at = found.index("--allowed-media-domains")
    assert found[at + 1 : at + 3] == ["a.example", "b.example"]


@pytest.mark.parametrize(
    "given, says",
    [
        (["ratio=2"], "ratio='2' is not allowed"),
        (["rato=0.9"], "did you mean 'ratio'?"),
        (["port=70000"], "port=70000 is not allowed"),
        (["vllm=--port=1"], "vllm='--port' is not allowed"),
        (["vllm=--hf_overrides {}"], "vllm='--hf-overrides' is not allowed"),
        (["plain=true", "ratio=0.9"], "plain=true serves without merging"),
        (["recipe=best", "tokens=20"], "is not supported under vLLM"),
        (["ratio=0.9", 'merging={"ratio": 0.8}'], "ratio stands in merging and beside it"),
        (["model=/nowhere/at/all"], "is neither a folder with a model nor a model on the hub"),
    ],
)
def test_what_is_not_allowed_ends_the_command_with_2(given, says, capsys):
    assert main([*given, "dry_run=true"]) == 2
    assert says in capsys.readouterr().err


def test_chats_start_with_the_token_that_the_tokenizer_starts_texts_with(tmp_path):
    found = words()
    template = found[found.index("--chat-template") + 1]
    processor = AutoProcessor.from_pretrained(embedded.PATH)
    assert template == "<s>" + processor.chat_template
    assert "--chat-template" not in words("vllm=--chat-template other.jinja")[:-2]
    processor.chat_template = template
    processor.save_pretrained(tmp_path)
    assert chat.template(str(tmp_path)) is None  # it writes it itself


def test_an_adapter_is_refused(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "embedded"}')
    assert main([f"model={tmp_path}", "dry_run=true"]) == 2
    assert "is an adapter" in capsys.readouterr().err


def test_a_copy_has_the_names_that_vllm_knows_and_the_same_weights(tmp_path):
    copy = renamed.write(embedded.PATH, tmp_path / "copy")
    assert renamed.is_new(embedded.PATH) and not renamed.is_new(copy)
    before, after = load_file(embedded.PATH / "model.safetensors"), load_file(copy / "model.safetensors")
    assert len(before) == len(after)
    for name, x in before.items():
        other = name.replace("vision_tower.", "vision_tower.vision_model.")
        assert torch.equal(after[other], x)
    assert (copy / "config.json").read_bytes() == (embedded.PATH / "config.json").read_bytes()
    again = renamed.write(copy, tmp_path / "again")
    assert load_file(again / "model.safetensors").keys() == after.keys()
    with pytest.raises(ValueError, match="the checkpoint itself"):
        renamed.write(copy, copy)


def test_a_copy_in_several_files_has_an_index_that_fits(model, tmp_path):
    model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    copy = renamed.write(tmp_path / "parts", tmp_path / "copy")
    index = json.loads((copy / renamed.INDEX).read_text())["weight_map"]
    held = {name: part.name for part in copy.glob("*.safetensors") for name in load_file(part)}
    assert index == held and any(name.startswith(renamed.OLD) for name in index)
