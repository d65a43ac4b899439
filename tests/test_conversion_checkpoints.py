"""Weights and configs of original checkpoints: what is read, what is written, and what is refused."""

import json
import subprocess
import sys

import originals
import pytest
import torch
from conftest import LAYERS, PATCHES
from originals import PROMPTS, ROWS, asked, changed, make_original, sharded
from PIL import Image

from llava_pitome import MergeConfig, load
from llava_pitome.cli import main as cli
from llava_pitome.models import checkpoints
from llava_pitome.models.conversion import processors


@pytest.fixture
def folder(original_folder):
    return original_folder


@pytest.fixture
def pictures():
    return originals.make_pictures()


def old_names(name):
    """As transformers 4 saved them."""
    return name.replace("vision_tower.vision_tower.", "vision_tower.vision_tower.vision_model.")


@pytest.mark.parametrize("rename", [str, old_names])
def test_a_published_config_and_shards_hold_the_same_model(original, folder, rename):
    whole = load(str(folder))[0].state_dict()
    tower = json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    published = originals.PUBLISHED | {"mm_vision_tower": tower}
    (sharded(folder, rename) / "config.json").write_text(json.dumps(published))
    found = load(str(folder))[0].state_dict()
    assert list(found) == list(whole)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    weights = original.state_dict()
    assert torch.equal(found["lm_head.weight"][:ROWS], weights["lm_head.weight"])
    assert torch.equal(
        found["model.language_model.layers.1.mlp.up_proj.weight"],
        weights["model.layers.1.mlp.up_proj.weight"],
    )


class Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_would_run_something_is_refused(folder, tmp_path):
    sharded(folder, count=1)
    shard = next(folder.glob("*.bin"))
    torch.save({"lm_head.weight": Trap(tmp_path / "trapped")}, shard)
    with pytest.raises(ValueError, match=f"{shard.name} holds no weights, or more than weights"):
        load(str(folder))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("held", [b"", b"no weights at all"])
def test_a_damaged_file_is_named(folder, held):
    sharded(folder, count=1)
    shard = next(folder.glob("*.bin"))
    shard.write_bytes(held)
    with pytest.raises(ValueError, match=f"{shard.name} holds no weights"):
        load(str(folder))


def test_positions_are_spread_as_the_checkpoint_says(folder):
    file = folder / "config.json"
    published = originals.PUBLISHED | {"mm_vision_tower": json.loads(file.read_text())["mm_vision_tower"]}
    file.write_text(
        json.dumps(published | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    )
    text = load(str(folder))[0].config.text_config
    assert text.rope_parameters["rope_theta"] == 500
    assert (text.rope_parameters["rope_type"], text.rope_parameters["factor"]) == ("linear", 2)


@pytest.mark.parametrize("rename", [str, old_names])
@pytest.mark.parametrize("learned", [True, False])
def test_the_tower_of_a_checkpoint_counts_only_where_it_learned(original, folder, learned, rename):
    sharded(folder, lambda name: rename(name))
    for shard in folder.glob("*.bin"):
        weights = torch.load(shard, weights_only=True)
        torch.save({k: v + ("vision_tower" in k) for k, v in weights.items()}, shard)
    found = load(str(changed(folder, unfreeze_mm_vision_tower=learned)))[0].model.vision_tower.state_dict()
    weights = original.get_vision_tower().vision_tower.state_dict()
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name] + learned) for name in found)


def test_the_other_half_of_a_clip_is_left_out(folder, clip_folder, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig.from_pretrained(clip_folder)
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    clip = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text))
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        (clip_folder / "preprocessor_config.json").read_text()
    )
    model, _ = load(str(changed(folder, mm_vision_tower=str(tmp_path / "clip"))))
    expected = {
        k.removeprefix("vision_model."): v for k, v in clip.state_dict().items() if "vision_model" in k
    }
    found = {k.removeprefix("vision_model."): v for k, v in model.model.vision_tower.state_dict().items()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_new_rows_of_the_vocabulary_are_never_the_next_token(original, folder, pictures):
    model, processor = load(str(folder))
    assert (processor.image_token_id, model.config.text_config.vocab_size) == (ROWS, 384)
    assert processor.tokenizer.pad_token_id == ROWS + 1 == model.generation_config.pad_token_id
    for found, weights in (
        (model.lm_head.weight, original.lm_head.weight),
        (model.model.language_model.embed_tokens.weight, original.model.embed_tokens.weight),
    ):
        assert torch.equal(found[:ROWS], weights)
        torch.testing.assert_close(found[ROWS:], weights.mean(0).expand(384 - ROWS, -1))
    inputs = asked(processor, PROMPTS, pictures)
    with torch.no_grad():
        assert bool((model(**inputs).logits.argmax(-1) < ROWS).all())
    torch.manual_seed(0)
    answers = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=50.0)
    answers = answers[:, inputs["input_ids"].shape[1] :]
    assert bool(((answers < ROWS) | (answers == processor.tokenizer.pad_token_id)).all())


def test_a_checkpoint_that_says_how_it_merges_is_loaded_so(folder):
    config = MergeConfig(tokens=7)
    model, processor = load(str(changed(folder, token_merging=config.to_dict())))
    assert model.config.token_merging == config.to_dict()
    text = processor(images=Image.new("RGB", (50, 40)), text="<image>", return_tensors="pt")
    assert (text.input_ids == processor.image_token_id).sum() == 7


def test_the_config_alone_says_how_many_patches_there_are(folder):
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert checkpoints.counts(str(folder)) == (PATCHES, LAYERS - 1)


def test_half_precision_becomes_bfloat16_on_cpus_and_stays_where_it_is_converted(folder, tmp_path, capsys):
    sharded(folder)
    for shard in folder.glob("*.bin"):
        torch.save({k: v.half() for k, v in torch.load(shard, weights_only=True).items()}, shard)
    changed(folder, dtype=None, torch_dtype="float16")
    if not torch.cuda.is_available():
        assert load(str(folder))[0].dtype == torch.bfloat16
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'new'}: LlavaForConditionalGeneration, torch.float16, with its processor\n"
    )
    assert load(str(tmp_path / "new"), dtype="float16")[0].dtype == torch.float16


def test_a_converted_folder_answers_as_the_checkpoint(folder, tmp_path, pictures):
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    (first, one), (second, two) = load(str(folder)), load(str(tmp_path / "new"))
    with torch.no_grad():
        expected = first(**asked(one, PROMPTS, pictures)).logits
        assert torch.equal(second(**asked(two, PROMPTS, pictures)).logits, expected)
    assert second.generation_config.suppress_tokens == list(range(ROWS, 384))


def test_the_language_model_can_be_quantized(clip_folder, vocabulary, pictures, tmp_path):
    wide = make_original(clip_folder, hidden_size=128, intermediate_size=128)  # blocks of 64 weights
    folder = originals.save(wide, vocabulary, tmp_path / "original")
    model, processor = load(str(folder), MergeConfig(tokens=7), quantization="4bit")
    kinds = {type(m).__name__ for m in model.model.language_model.modules()}
    assert "Linear4bit" in kinds
    assert model.generate(**asked(processor, PROMPTS[:1], pictures), max_new_tokens=2).shape[0] == 1


def test_the_package_itself_is_not_needed(folder):
    code = (
        "import sys\n"
        "sys.modules['llava'] = None\n"  # an import of it raises from here on
        "from llava_pitome import load\n"
        "print(type(load(sys.argv[1])[0]).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LlavaForConditionalGeneration"


# What is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"},
            r"\['LlavaMptForCausalLM'\] is not",
        ),
        (
            {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"},
            r"MistralForCausalLM'\] is",
        ),
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
        ({"mm_vision_select_layer": [-2, -3]}, r"\[-2, -3\] is not allowed: it must be a int"),
        ({"mm_vision_tower": None}, "mm_vision_tower=None is not allowed"),
        ({"mm_vision_tower": "/nowhere/at/all"}, "neither a folder with a model nor a model on the hub"),
    ],
)
def test_what_is_no_llava_1_5_raises(folder, changes, message):
    for call in (load, checkpoints.counts):
        with pytest.raises(ValueError, match=message):
            call(str(changed(folder, **changes)))


def test_a_tower_that_is_no_clip_raises(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="'siglip_vision_model'; allowed are 'clip', 'clip_vision_model'"):
        load(str(changed(folder, mm_vision_tower=str(tmp_path))))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("model.mm_projector.2.bias"), r"lacks weights: .*projector\.linear_2\.bias"),
        (lambda w: w.pop("lm_head.weight"), "lacks weights: lm_head.weight"),
        (
            lambda w: w.update({"model.image_newline": torch.ones(32)}),
            r"no LLaVA-1\.5 has: model\.image_newline",
        ),
        (lambda w: w.update({"lm_head.weight": torch.ones(9, 32)}), "340 embeddings, but 9 rows"),
    ],
)
def test_weights_that_do_not_fit_raise(folder, change, message):
    sharded(folder, count=1)
    shard = next(folder.glob("*.bin"))
    weights = torch.load(shard, weights_only=True)
    change(weights)
    torch.save(weights, shard)
    with pytest.raises(ValueError, match=message):
        load(str(folder))


def test_a_folder_without_weights_raises(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no weights; allowed are model\.safetensors, pytorch_model"):
        load(str(folder))


@pytest.mark.parametrize("missing", processors.READERS)
def test_a_tokenizer_that_cannot_be_read_says_what_to_install(folder, monkeypatch, missing):
    monkeypatch.setattr(processors, "find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ValueError, match=r"pip install 'llava-pitome\[original\]'"):
        load(str(folder))


def test_convert_refuses_what_is_no_original_and_never_writes_over_anything(folder, tmp_path, capsys):
    assert cli.main(["convert", "/nowhere/at/all", str(tmp_path / "new")]) == 2
    assert "neither a folder" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(folder)]) == 2
    assert "holds something; name a folder that is new or empty" in capsys.readouterr().err
    assert cli.main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert cli.main(["convert", str(tmp_path / "new"), str(tmp_path / "newer")]) == 2
    assert "not of the original package" in capsys.readouterr().err
    assert not (tmp_path / "newer").exists()
