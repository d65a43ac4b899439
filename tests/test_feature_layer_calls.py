"""Several feature layers in calls, errors, saved models, adapters and the tools around a model."""

import copy
import re

import pytest
import torch
from conftest import LAYERS, PATCHES, SIDE, make_model, make_processor, make_vip_llava
from precise import ENCODES_FIRST, precise
from prompts import IMAGE, PROMPTS, batch, generate, single
from test_calls import SELECTS_LAYERS
from test_tower import images
from transformers import AutoModel, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove
from llava_pitome.integrations.vllm import validation
from llava_pitome.models import hf_llava
from llava_pitome.models.checkpoints import patches_and_layers
from llava_pitome.models.image_dedup import encode_once
from llava_pitome.tracing import trace_image

LIST = [-2, -5, -7, 3]
MODELS = {"vip": make_vip_llava, "list": lambda: make_model(vision_feature_layer=LIST)}
NAMES = {"vip": "vision_feature_layer" if SELECTS_LAYERS else "vision_feature_layers"}
BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [MergeConfig(ratio=0.8), BEST, MergeConfig(decoder={0: 0.5})]


@pytest.fixture(params=MODELS)
def model(request):
    made = MODELS[request.param]()
    made.layer_argument = NAMES.get(request.param, "vision_feature_layer")
    return made


# Calls


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("call", ["forward", "generate", "get_image_features"])
def test_the_models_own_layers_may_be_named(call, config, model, processor, pictures):
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)

        def run(**named):
            if call == "forward":
                return model(**inputs, **named).logits
            if call == "generate":
                return model.generate(**inputs, **named, max_new_tokens=3, do_sample=False)
            return torch.stack(list(model.get_image_features(inputs["pixel_values"], **named).pooler_output))

        expected = run()
        for layers in (LIST, tuple(LIST), [7, 4, 2, 3], [-2, 4, -7, -6]):
            assert torch.equal(run(**{model.layer_argument: layers}), expected)


OTHERS = {
    "another": [-2, -5, -7, 4], "in another order": [-5, -2, -7, 3], "fewer": [-2, -5, -7],
    "more": [-2, -5, -7, 3, 3], "a later one": [-1, -5, -7, 3], "one alone": -2,
    "out of range": [-2, -5, -7, 9], "none": [],
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("layers", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("call", ["forward", "generate", *["get_image_features"] * SELECTS_LAYERS])
def test_other_layers_are_refused_before_anything_is_computed(
    call, layers, config, model, processor, pictures
):
    apply(model, config, processor)
    inputs, named = single(processor, PROMPTS[0], pictures), {model.layer_argument: layers}
    ran = []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with (
        pytest.raises(ValueError, match=r"vision_feature_layer=.* (contradicts|is not allowed)"),
        torch.no_grad(),
    ):
        if call == "forward":
            model(**inputs, **named)
        elif call == "generate":
            model.generate(**inputs, **named, max_new_tokens=2)
        else:
            model.get_image_features(pixel_values=inputs["pixel_values"], **named)
    assert not ran


# before transformers 5.23 a LlavaForConditionalGeneration names them neither in its calls nor to its tower
@pytest.mark.parametrize("kind", [kind for kind in MODELS if SELECTS_LAYERS or kind == "vip"])
def test_a_config_that_is_changed_after_apply_raises(kind, processor, pictures):
    model = MODELS[kind]()
    apply(model, MergeConfig(ratio=0.8), processor)
    setattr(model.config, NAMES.get(kind, "vision_feature_layer"), LIST[::-1])
    with pytest.raises(ValueError, match=r"contradicts \[7, 4, 2, 3\] of 8"):
        model(**single(processor, PROMPTS[0], pictures))


BAD = {
    "too deep": [-2, 9], "too deep from the end": [-10, -2], "embeddings alone": [0], "embeddings": [0, -9],
    "none": [], "no tuple": (), "a word": ["last"], "a fraction": [-2.0], "a word alone": "last",
}  # fmt: skip


@pytest.mark.parametrize("layers", BAD.values(), ids=BAD)
@pytest.mark.parametrize("kind", MODELS)
def test_layers_that_the_tower_lacks_are_refused(kind, layers):
    model = MODELS[kind]()
    before = copy.deepcopy(vars(model))
    name = NAMES.get(kind, "vision_feature_layer")
    vars(model.config)[name] = layers  # past the checks of transformers' own
    with pytest.raises(ValueError, match=re.escape(f"vision_feature_layer={layers!r} is not allowed")):
        apply(model, MergeConfig(ratio=0.9))
    assert vars(model).keys() == before.keys()


@pytest.mark.parametrize(
    "make, layers",
    [
        *((make_vip_llava, layers) for layers in ([-2], (7,), -2)),
        *((lambda layers: make_model(vision_feature_layer=layers), layers) for layers in ([-2], [7])),
    ],
)
def test_a_list_of_one_layer_is_that_layer(make, layers, processor, pictures):
    found = []
    for one in (layers, 7):
        model = make(one)
        with merge_tokens(model, BEST, processor) as merging, torch.no_grad():
            found.append(model(**batch(processor, PROMPTS, pictures)).logits)
            assert all(tokens.result is None for tokens in merging.tower.last.tokens)
    assert torch.equal(*found)


def test_vip_llava_always_drops_the_first_token(pictures):
    """Whatever its config says, as transformers ignores it."""
    model, processor = make_vip_llava(), make_processor()
    model.config.vision_feature_select_strategy = "full"
    assert not hf_llava.find(model).llava.reads_first_token
    with merge_tokens(model, BEST, processor), torch.no_grad():
        assert (single(processor, PROMPTS[0], pictures).input_ids == IMAGE).sum() == 6
        assert generate(model, single(processor, PROMPTS[0], pictures)).shape == (1, 6)
    siglip = make_vip_llava(tower="siglip")
    with merge_tokens(siglip, MergeConfig(ratio=0.8)):
        siglip.get_image_features(images())
    with pytest.raises(ValueError, match="drops the first patch of a tower without class token"):
        apply(siglip, BEST)


# Saved models and adapters


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_model_merges_again(config, model, processor, pictures, tmp_path):
    with merge_tokens(model, config, processor):
        expected = generate(model, batch(processor, PROMPTS, pictures))
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    loaded, own = load(str(tmp_path))
    assert type(loaded) is type(model) and MergeConfig.from_dict(loaded.config.token_merging) == config
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)
    assert patches_and_layers(str(tmp_path)) == (PATCHES, LAYERS - 1)


def test_a_vip_llava_without_head_merges_and_load_says_that_it_cannot_generate(pictures, tmp_path):
    model, processor, config = make_vip_llava(), make_processor(), CONFIGS[2]
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, PROMPTS, pictures)
        expected = model.model(**inputs).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    headless = AutoModel.from_pretrained(tmp_path / "whole")
    with merge_tokens(headless, config, processor), torch.no_grad():
        assert torch.equal(headless(**inputs).last_hidden_state, expected)
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="holds a VipLlavaModel, which has no language model head"):
        load(str(tmp_path / "headless"))


@pytest.mark.parametrize("first", ["peft", "merging"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_adapters_of_every_part_train_and_merge_as_folded_in(config, first, model, processor, pictures):
    from peft import LoraConfig, get_peft_model

    targets = r".*(vision_tower.*(q_proj|fc2)|language_model.*(q_proj|v_proj))"
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"])
    if first == "merging" and config.merging_layers:
        apply(model, MergeConfig(ratio=0.9))  # projections of layers that merge are wrapped before that
    elif first == "merging":
        apply(model, config, processor)
    tuned = get_peft_model(precise(model), lora, autocast_adapter_dtype=False).eval()
    apply(tuned, config, processor)
    inputs = batch(processor, PROMPTS, pictures).to(torch.float64)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # a LoRA's A has gradients once its B is not zero
        optimizer.zero_grad()
        tuned(**inputs, labels=inputs.input_ids).loss.backward()
        optimizer.step()
    trained = {n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(f"layers.{i}.mlp.fc2.lora_A.default.weight" in " ".join(trained) for i in range(LAYERS - 1))
    with torch.no_grad():
        found = tuned(**inputs).logits
        remove(tuned)
        folded = tuned.merge_and_unload()
        with merge_tokens(folded, config, processor):
            torch.testing.assert_close(folded(**inputs).logits, found, rtol=0, atol=1e-5)


# Around a model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_an_image_is_traced(config, model, processor, pictures):
    found = trace_image(model, processor, pictures[0], config, PROMPTS[0])
    lengths = config.lengths(PATCHES, LAYERS - 1)
    assert found.image.size == (SIDE, SIDE)
    assert [found.trace.after("tower", i).tokens for i in range(LAYERS - 1)] == list(lengths[1:])


@pytest.mark.skipif(not ENCODES_FIRST, reason="this transformers takes no images that are encoded already")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_pictures_that_repeat_are_encoded_once(config, model, processor, pictures):
    seen = [[pictures[0]], [pictures[1], pictures[0]], [pictures[1]]]
    with merge_tokens(model.double(), config, processor), torch.no_grad():
        inputs = processor(images=seen, text=PROMPTS[:3], return_tensors="pt", padding=True).to(torch.float64)
        expected, once = generate(model, inputs), encode_once(model, dict(inputs))
        assert "mm_encoder_outputs" in once and "pixel_values" not in once
        assert torch.equal(generate(model, once), expected)


@pytest.mark.skipif(not ENCODES_FIRST, reason="this transformers takes no images that are encoded already")
def test_features_may_be_kept_for_a_later_call(model, processor, pictures):
    with merge_tokens(model, BEST, processor), torch.no_grad():
        inputs = single(processor, PROMPTS[1], pictures)
        expected = model(**inputs).logits
        pixels = inputs.pop("pixel_values")
        kept = model.get_image_features(pixels).pooler_output
        model.get_image_features(pixels.flip(0))  # another call meanwhile
        encoded = {"image": BaseModelOutputWithPooling(pooler_output=kept)}
        assert torch.equal(model(**inputs, mm_encoder_outputs=encoded).logits, expected)


def test_vllm_refuses_several_layers():
    config = make_model(vision_feature_layer=LIST).config
    with pytest.raises(
        ValueError, match=r"vision_feature_layer=\[-2, -5, -7, 3\] is not supported under vLLM"
    ):
        validation.check(MergeConfig(ratio=0.9), config)


def test_errors_list_what_is_supported(tmp_path):
    from transformers import AutoConfig

    with pytest.raises(ValueError, match=r"Supported: .*VipLlavaForConditionalGeneration.*several of its"):
        apply(torch.nn.Linear(2, 2), MergeConfig(ratio=0.9))
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'llama'. Supported: .*VipLlavaForConditionalGeneration"):
        load(str(tmp_path))


def test_its_processor_is_that_of_llava(processor, tmp_path):
    make_vip_llava().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
