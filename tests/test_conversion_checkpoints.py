"""Weights and configs of original checkpoints: what is read, written and refused."""

import json
import sys

import originals
import pytest
import torch
from conftest import LAYERS, PATCHES
from originals import PROMPTS, ROWS, change_config, converted_inputs, make_original, shard
from PIL import Image

from llava_pitome import MergeConfig, load
from llava_pitome.cli import main as cli
from llava_pitome.models import checkpoints
from llava_pitome.models.conversion import processor as processor_conversion


@pytest.fixture
def folder(original_folder):
    return original_folder


@pytest.fixture
def published(folder):
    """The folder's config.json, with the keys of a published one."""
    return originals.PUBLISHED | {
        "mm_vision_tower": json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    }


def names_of_transformers_4(name):
    return name.replace("vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model.")


def change_weights(folder, change, rename=str, count=1):
    """Shards a checkpoint, and passes the weights of each shard through `change`."""
    for file in shard(folder, rename, count).glob("*.bin"):
        torch.save(change(torch.load(file, weights_only=True)), file)


@pytest.mark.parametrize("rename", [str, names_of_transformers_4])
def test_a_published_config_and_shards_load_as_the_same_model(original, folder, published, rename):
    expected = load(str(folder))[0].state_dict()
    (shard(folder, rename) / "config.json").write_text(json.dumps(published))
    state = load(str(folder))[0].state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    weights, up = original.state_dict(), "layers.1.mlp.up_proj.weight"
    assert torch.equal(state["lm_head.weight"][:ROWS], weights["lm_head.weight"])
    assert torch.equal(state[f"model.language_model.{up}"], weights[f"model.{up}"])


def test_rope_parameters_are_those_of_the_checkpoint(folder, published):
    rope = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(published | rope))
    rope = load(str(folder))[0].config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (500, "linear", 2)


@pytest.mark.parametrize("rename", [str, names_of_transformers_4])
@pytest.mark.parametrize("trained", [True, False])
def test_a_checkpoints_tower_is_read_only_where_it_was_trained(original, folder, trained, rename):
    change_weights(folder, lambda w: {k: v + ("vision_tower" in k) for k, v in w.items()}, rename, 3)
    state = load(str(change_config(folder, unfreeze_mm_vision_tower=trained)))[
        0
    ].model.vision_tower.state_dict()
    weights = original.get_vision_tower().vision_tower.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], weights[name] + trained) for name in state)


def test_of_a_whole_clip_the_vision_tower_is_read(folder, clip_folder, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    vision = CLIPVisionConfig.from_pretrained(clip_folder).to_dict()
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=dict(zip(sizes, (8, 8, 1, 1, 9)))))
    clip.save_pretrained(tmp_path / "clip")
    preprocessor = (clip_folder / "preprocessor_config.json").read_text()
    (tmp_path / "clip" / "preprocessor_config.json").write_text(preprocessor)
    model, _ = load(str(change_config(folder, mm_vision_tower=str(tmp_path / "clip"))))

    def bare(state):
        return {k.removeprefix("vision_model."): v for k, v in state.items()}

    expected = bare({k: v for k, v in clip.state_dict().items() if "vision_model" in k})
    state = bare(model.model.vision_tower.state_dict())
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_added_rows_of_the_vocabulary_are_never_the_next_token(original, folder):
    model, processor = load(str(folder))
    assert (processor.image_token_id, model.config.text_config.vocab_size) == (ROWS, 384)
    assert processor.tokenizer.pad_token_id == ROWS + 1 == model.generation_config.pad_token_id
    for weight, expected in (
        (model.lm_head.weight, original.lm_head.weight),
        (model.model.language_model.embed_tokens.weight, original.model.embed_tokens.weight),
    ):
        assert torch.equal(weight[:ROWS], expected)
        torch.testing.assert_close(weight[ROWS:], expected.mean(0).expand(384 - ROWS, -1))
    inputs = converted_inputs(processor, PROMPTS, originals.make_images())
    with torch.no_grad():
        assert bool((model(**inputs).logits.argmax(-1) < ROWS).all())
    torch.manual_seed(0)
    answers = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=50.0)
    answers = answers[:, inputs["input_ids"].shape[1] :]
    assert bool(((answers < ROWS) | (answers == processor.tokenizer.pad_token_id)).all())


def test_a_saved_merge_config_is_applied(folder):
    config = MergeConfig(tokens=7)
    model, processor = load(str(change_config(folder, token_merging=config.to_dict())))
    assert model.config.token_merging == config.to_dict()
    text = processor(images=Image.new("RGB", (50, 40)), text="<image>", return_tensors="pt")
    assert (text.input_ids == processor.image_token_id).sum() == 7


def test_patches_and_layers_are_read_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert checkpoints.patches_and_layers(str(folder)) == (PATCHES, LAYERS - 1)


def test_float16_becomes_bfloat16_on_cpus_except_in_conversion(folder, tmp_path, capsys):
    change_weights(folder, lambda weights: {k: v.half() for k, v in weights.items()}, count=3)
    change_config(folder, dtype=None, torch_dtype="float16")
    if not torch.cuda.is_available():
        assert load(str(folder))[0].dtype == torch.bfloat16
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'new'}: LlavaForConditionalGeneration, torch.float16, with its processor\n"
    )
    assert load(str(tmp_path / "new"), dtype="float16")[0].dtype == torch.float16


def test_a_converted_folder_has_the_logits_of_the_checkpoint(folder, tmp_path):
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    images, logits = originals.make_images(), []
    for path in (folder, tmp_path / "new"):
        model, processor = load(str(path))
        with torch.no_grad():
            logits.append(model(**converted_inputs(processor, PROMPTS, images)).logits)
        assert model.generation_config.suppress_tokens == list(range(ROWS, 384))
    assert torch.equal(*logits)


def test_the_language_model_can_be_quantized(clip_folder, vocabulary, tmp_path):
    wide = make_original(clip_folder, hidden_size=128, intermediate_size=128)  # in blocks of 64 weights
    folder = originals.save(wide, vocabulary, tmp_path / "original")
    model, processor = load(str(folder), MergeConfig(tokens=7), quantization="4bit")
    assert "Linear4bit" in {type(m).__name__ for m in model.model.language_model.modules()}
    inputs = converted_inputs(processor, PROMPTS[:1], originals.make_images())
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1


def test_the_original_package_is_not_imported(folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llava", None)  # its import raises
    assert type(load(str(folder))[0]).__name__ == "LlavaForConditionalGeneration"


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, r"\['LlavaMptForCausalLM'\] is not supported"),
        ({"architectures": ["LlavaMistralForCausalLM"]}, r"\['LlavaMistralForCausalLM'\] is not supported"),
        ({"architectures": None, "model_type": "llava_mpt"}, r"\['llava_mpt'\] is not supported"),
        ({"image_aspect_ratio": "anyres"}, "'anyres' is not supported"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad' .*is not supported"),
        (
            {"mm_projector_type": "linear"},
            "mm_projector_type='linear' is not supported; allowed is LLaVA-1.5",
        ),
        ({"mm_projector_type": None}, "mm_projector_type='linear' is not"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True is not supported"),
        ({"s2": True}, "s2=True is not supported"),
        ({"mm_vision_select_feature": "slices"}, "'slices' is unknown; allowed are 'patch', 'cls_patch'"),
        ({"mm_vision_select_layer": [-2, -3]}, r"\[-2, -3\] is not allowed: its type must be int"),
        ({"mm_vision_tower": None}, "mm_vision_tower=None is not allowed"),
        ({"mm_vision_tower": "/nowhere/at/all"}, "neither a folder with a model nor a model on the hub"),
        ({"mm_vision_tower": "SIGLIP"}, "'siglip_vision_model'; allowed are 'clip', 'clip_vision_model'"),
    ],
)
def test_anything_but_a_llava_1_5_with_a_clip_raises(folder, tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    changes = {k: str(tmp_path) if v == "SIGLIP" else v for k, v in changes.items()}
    for call in (load, checkpoints.patches_and_layers):
        with pytest.raises(ValueError, match=message):
            call(str(change_config(folder, **changes)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.mm_projector.2.bias": None}, r"lacks weights: .*projector\.linear_2\.bias"),
        ({"lm_head.weight": None}, "lacks weights: lm_head.weight"),
        ({"model.image_newline": torch.ones(32)}, r"no LLaVA-1\.5 has: model\.image_newline"),
        ({"lm_head.weight": torch.ones(9, 32)}, "340 embeddings, but 9 rows"),
    ],
)
def test_weights_that_do_not_fit_raise(folder, change, message):
    change_weights(folder, lambda weights: {k: v for k, v in (weights | change).items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load(str(folder))


class Opener:
    """Opens, and so creates, a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_of_more_than_tensors_is_not_executed(folder, tmp_path):
    change_weights(folder, lambda weights: {"lm_head.weight": Opener(tmp_path / "opened")})
    with pytest.raises(ValueError, match=r"\.bin holds no weights, or more than weights"):
        load(str(folder))
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
def test_a_damaged_file_raises(folder, content):
    (file,) = shard(folder, count=1).glob("*.bin")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} holds no weights"):
        load(str(folder))


def test_a_folder_without_weights_raises(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights; allowed are model\.safetensors, pytorch_model"):
        load(str(folder))


@pytest.mark.parametrize("missing", processor_conversion.READERS)
def test_a_missing_tokenizer_package_raises_with_what_to_install(folder, monkeypatch, missing):
    monkeypatch.setattr(processor_conversion, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ValueError, match=r"pip install 'llava-pitome\[original\]'"):
        load(str(folder))


def test_convert_refuses_other_checkpoints_and_used_folders(folder, tmp_path, capsys):
    assert cli.main(["convert", "/nowhere/at/all", str(tmp_path / "new")]) == 2
    assert "neither a folder" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(folder)]) == 2
    assert "holds something; name a folder that is new or empty" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert cli.main(["convert", str(tmp_path / "new"), str(tmp_path / "newer")]) == 2
    assert "not of the original package" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()
