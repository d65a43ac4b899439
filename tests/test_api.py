import copy

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor
from prompts import IMAGE, PAD, PROMPTS, RECIPES, batch, features, generate, single
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
)

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove

# Apply, remove, and the context


def test_the_readmes_lines_answer_with_fewer_tokens(model, processor, pictures):
    with merge_tokens(model, MergeConfig(ratio=0.9), processor) as merging:
        inputs = processor(images=pictures[0], text="<image> what is this", return_tensors="pt")
        assert (inputs.input_ids == IMAGE).sum() == merging.tower.lengths(PATCHES)[-1] < PATCHES / 1.8
        assert generate(model, inputs).shape == (1, 6)
    assert (
        processor(images=pictures[0], text="<image>", return_tensors="pt").input_ids == IMAGE
    ).sum() == PATCHES


def test_the_config_goes_with_the_model_while_it_merges(model):
    config = MergeConfig(ratio=0.8, parameters={"margin": 0.3})
    with merge_tokens(model, config):
        assert MergeConfig.from_dict(model.config.token_merging) == config
    assert not hasattr(model.config, "token_merging")


def test_removing_what_was_never_applied_does_nothing(model):
    before = model.config.to_dict()
    remove(model)
    remove(model)
    assert model.config.to_dict() == before


def test_an_inner_context_gives_the_outer_config_back(model, processor, pictures):
    def arriving():
        return (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum().item()

    with merge_tokens(model, MergeConfig(tokens=12), processor):
        outer = generate(model, single(processor, PROMPTS[0], pictures))
        with merge_tokens(model, MergeConfig(tokens=7), processor):
            assert arriving() == 7
            with pytest.raises(KeyError), merge_tokens(model, MergeConfig(ratio=1.0), processor):
                assert arriving() == PATCHES
                raise KeyError
            assert arriving() == 7
        assert arriving() == 12
        assert model.config.token_merging["tokens"] == 12
        assert torch.equal(generate(model, single(processor, PROMPTS[0], pictures)), outer)
    assert arriving() == PATCHES


def test_a_copy_of_a_merging_model_merges_by_itself_and_can_be_made_plain(model, pictures):
    plain = features(model, {"pixel_values": torch.ones(1, 3, 48, 48)})
    apply(model, MergeConfig(tokens=9))
    copied = copy.deepcopy(model)
    remove(model)
    assert features(copied, {"pixel_values": torch.ones(1, 3, 48, 48)}).shape[1] == 10
    apply(copied, MergeConfig(tokens=5))
    assert features(copied, {"pixel_values": torch.ones(1, 3, 48, 48)}).shape[1] == 6
    remove(copied)
    again = copy.deepcopy(copied)
    apply(again, MergeConfig(tokens=9))
    for one in (copied, copy.deepcopy(again)):
        remove(one)
        assert torch.equal(features(one, {"pixel_values": torch.ones(1, 3, 48, 48)}), plain)
        assert not hasattr(one.config, "token_merging")


def test_two_models_merge_each_by_its_own_config(pictures):
    one, two, first, second = make_model(), make_model(seed=1), make_processor(), make_processor()
    with merge_tokens(one, MergeConfig(tokens=9), first), merge_tokens(two, MergeConfig(tokens=4), second):
        assert features(one, single(first, PROMPTS[0], pictures)).shape[1] == 10
        assert features(two, single(second, PROMPTS[0], pictures)).shape[1] == 5


# Batches


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_batch_answers_as_its_rows_alone(tower, config, pictures):
    model, processor = make_model(tower), make_processor(tower)
    with merge_tokens(model, config, processor) as merging, torch.no_grad():
        inputs, kept = (
            batch(processor, PROMPTS, pictures),
            config.tokens_at(PATCHES, merging.tower.num_layers),
        )
        assert (inputs.input_ids == IMAGE).sum(1).tolist() == [kept, 2 * kept, kept, 0]
        assert (
            (inputs.input_ids[-1] == PAD).sum() > 0 == (inputs.input_ids[-1, -3:] == PAD).sum()
        )  # left padding
        together, answers = model(**inputs).logits, generate(model, inputs)
        for row, prompt in enumerate(PROMPTS):
            alone = single(processor, prompt, pictures)
            length = alone.input_ids.shape[1]
            torch.testing.assert_close(together[row, -length:], model(**alone).logits[0], rtol=0, atol=2e-4)
            assert torch.equal(answers[row], generate(model, alone)[0])


def test_prompts_of_text_alone_answer_as_without_merging(model, processor):
    inputs = processor(text=["what is this", "two and three"], return_tensors="pt", padding=True)
    plain = generate(model, inputs)
    with merge_tokens(model, MergeConfig(ratio=0.8), processor):
        merged = processor(text=["what is this", "two and three"], return_tensors="pt", padding=True)
        assert torch.equal(merged.input_ids, inputs.input_ids)
        assert torch.equal(generate(model, merged), plain)


def test_the_cache_is_as_short_as_the_prompt(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=5), processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)
        out = model(**inputs, use_cache=True)
    assert out.past_key_values.get_seq_length() == 5 + 3


def test_labels_train_on_the_short_prompt(model, processor, pictures):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
        labels = inputs.input_ids.masked_fill(inputs.input_ids == IMAGE, -100)
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_as_many_placeholders_as_patches_are_an_error_and_no_silent_answer(model, processor, pictures):
    inputs = single(processor, PROMPTS[0], pictures)
    with (
        merge_tokens(model, MergeConfig(tokens=5), processor),
        pytest.raises(ValueError, match="do not match"),
    ):
        model(**inputs)


# Kernels, dtypes, devices


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_sdpa_and_eager_agree(tower, config, pictures):
    processor, found = make_processor(tower), []
    for kernel in ("sdpa", "eager"):
        model = make_model(tower, attn_implementation=kernel)
        with merge_tokens(model, config, processor), torch.no_grad():
            found.append(model(**batch(processor, PROMPTS, pictures)).logits[:, -1])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("config", RECIPES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_bfloat16_answers(tower, kernel, config, pictures):
    model, processor = make_model(tower, attn_implementation=kernel).bfloat16(), make_processor(tower)
    with merge_tokens(model, config, processor) as merging:
        inputs = batch(processor, PROMPTS, pictures).to(torch.bfloat16)
        found = features(model, inputs)
        assert found.dtype == torch.bfloat16
        assert found.isfinite().all()
        assert [s.patch_sizes.dtype for s in merging.tower.last.tokens] == [torch.float32] * LAYERS
        assert generate(model, inputs).shape == (len(PROMPTS), 6)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"dtype": torch.bfloat16},
        {"attn_implementation": "eager"},
    ],
)
def test_loading_takes_the_options_of_transformers(model, processor, saved, pictures, options):
    config = MergeConfig(tokens=5)
    loaded, own = load(str(saved), config, **options)
    assert loaded.dtype == options.get("dtype", torch.float32)
    found = generate(loaded, batch(own, PROMPTS, pictures).to(loaded.device))
    plain = type(model).from_pretrained(saved, dtype=loaded.dtype)  # .to would round the rotary frequencies
    with merge_tokens(plain, config, processor):
        assert torch.equal(found.cpu(), generate(plain, batch(processor, PROMPTS, pictures)))


# What cannot be done


def test_a_model_that_is_no_llava_raises_with_what_is_supported():
    llama = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, vocab_size=9))  # fmt: skip
    for model in (llama, torch.nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} is not supported. Supported: Llava.*CLIP.*Siglip"
        ):
            apply(model, MergeConfig(ratio=0.9))


def test_a_checkpoint_that_is_no_llava_raises_with_what_is_supported(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type 'llama'. Supported: Llava"):
        load(str(tmp_path))


@pytest.mark.parametrize("layer", [9, -10])
def test_a_feature_layer_that_the_tower_lacks_raises(layer):
    with pytest.raises(ValueError, match=f"vision_feature_layer={layer}"):
        apply(make_model(vision_feature_layer=layer), MergeConfig(ratio=0.9))


def test_more_tokens_than_patches_raise(model):
    with pytest.raises(ValueError, match=r"tokens=37 .*36 patches, allowed is 1 to 36"):
        apply(model, MergeConfig(tokens=37))


def test_another_number_of_ratios_than_layers_raises(model):
    with pytest.raises(ValueError, match="2 shares; the tower has 7 layers"):
        apply(model, MergeConfig(ratio=(0.9, 0.9)))


def test_an_attention_implementation_that_takes_no_bias_raises(model):
    model.model.vision_tower.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention'.*'sdpa', 'eager' or flash.*proportional=False"):
        apply(model, MergeConfig(ratio=0.9))
    apply(model, MergeConfig(ratio=0.9, proportional=False))
    remove(model)
    assert model.model.vision_tower.config._attn_implementation == "flex_attention"


def test_a_processor_of_another_patch_size_raises(model, processor):
    processor.patch_size = 14
    with pytest.raises(ValueError, match="patch_size=14, the model 8"):
        apply(model, MergeConfig(ratio=0.9), processor)


def test_an_unknown_quantization_raises_before_anything_is_read():
    with pytest.raises(ValueError, match="quantization='3bit' is unknown; allowed are 4bit, 8bit"):
        load("no/such/folder", quantization="3bit")


def failures():
    other = make_processor()
    other.patch_size = 14
    return {
        "tokens": (MergeConfig(tokens=99), None),
        "ratios": (MergeConfig(ratio=(0.9,)), None),
        "processor": (MergeConfig(ratio=0.9), other),
        "no processor": (MergeConfig(ratio=0.9), other.tokenizer),
    }


def hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("failure", failures())
def test_an_apply_that_fails_leaves_a_plain_model_plain(model, failure):
    before, config = hooks(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError):
        apply(model, *failures()[failure])
    assert hooks(model) == before
    assert model.config.to_dict() == config


@pytest.mark.parametrize("failure", failures())
@pytest.mark.parametrize("verb", ["apply", "merge_tokens"])
def test_an_apply_that_fails_leaves_the_config_before_it_in_force(model, processor, pictures, verb, failure):
    with merge_tokens(model, MergeConfig(tokens=7), processor):
        before, config = hooks(model), copy.deepcopy(model.config.to_dict())
        with pytest.raises(ValueError):
            if verb == "apply":
                apply(model, *failures()[failure])
            else:
                with merge_tokens(model, *failures()[failure]):
                    raise AssertionError("not reached")
        assert hooks(model) == before
        assert model.config.to_dict() == config
        assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 7
    assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES


def test_the_saved_processor_loads_unfitted(model, processor, pictures, tmp_path):
    with merge_tokens(model, MergeConfig(tokens=5), processor):
        processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (single(loaded, PROMPTS[0], pictures).input_ids == IMAGE).sum() == PATCHES
