"""Models without a language model head or without a language model: LlavaModel, and CLIP and SigLIP around a
vision tower."""

import copy

import pytest
import torch
from conftest import LAYERS, PATCH, PATCHES, SIDE, VISION, make_model
from prompts import PROMPTS, RECIPES, batch, single
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
)

from llava_pitome import MergeConfig, applied, apply, load, merge_tokens, remove
from llava_pitome.flops import closed_form, counted
from llava_pitome.models.hf_llava import UnsupportedModelError
from llava_pitome.tracing import trace_image

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 3,
}  # fmt: skip
CONFIGS = [
    MergeConfig(ratio=0.8),
    MergeConfig.recipe("released", ratio=0.8),
    MergeConfig(tokens=5, method="tome"),
    MergeConfig(tokens=9, method="diffrate"),
    MergeConfig(resize=(4, 5)),
    MergeConfig(ratio=0.8, resize=(5, 5)),
]


def vision_with_projection():
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=16))


def clip():
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


def siglip():
    return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))


MAKERS = {"CLIPVisionModelWithProjection": vision_with_projection, "CLIPModel": clip, "SiglipModel": siglip}


@pytest.fixture(params=MAKERS)
def around(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


@pytest.fixture
def pixels():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


IDS = torch.tensor([[1, 7, 5, 2], [1, 4, 9, 2]])


def embed(model, pixels):
    """What the model makes of images (B, D)."""
    with torch.no_grad():
        if isinstance(model, CLIPVisionModelWithProjection):
            return model(pixel_values=pixels).image_embeds
        return model.get_image_features(pixel_values=pixels).pooler_output


def outputs(model, pixels):
    """All that it computes."""
    found = [embed(model, pixels)]
    if not isinstance(model, CLIPVisionModelWithProjection):
        with torch.no_grad():
            both = model(input_ids=IDS, pixel_values=pixels)
            text = model.get_text_features(input_ids=IDS).pooler_output
        found += [both.logits_per_image, both.logits_per_text, both.image_embeds, both.text_embeds, text]
    return found


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fingerprint(model):
    """What `remove` has to give back besides outputs."""
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return hooks, model.config.to_dict(), [c._attn_implementation for c in configs(model)]


def configs(model):
    return [m.config for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_embedding_is_that_of_the_merging_tower_projected(config, around, pixels):
    tower = copy.deepcopy(around.vision_model)
    with merge_tokens(tower, config), torch.no_grad():
        expected = tower(pixels)
    with merge_tokens(around, config) as handle, torch.no_grad():
        found = around.vision_model(pixels).last_hidden_state
        embedded = embed(around, pixels)
        assert len(handle.plans()) == (LAYERS if config.ratio else len(handle.plans()))
    assert torch.equal(found, expected.last_hidden_state)
    project = getattr(around, "visual_projection", torch.nn.Identity())
    assert torch.equal(embedded, project(expected.pooler_output))
    prefix = 0 if isinstance(around, SiglipModel) else 1
    seen = config.patches_at(PATCHES)
    assert found.shape[1] == config.lengths(seen, LAYERS)[-1] + prefix < PATCHES
    assert not torch.equal(embedded, embed(around, pixels))


def test_a_forward_pass_scores_the_merged_image_against_the_plain_text(around, pixels):
    if isinstance(around, CLIPVisionModelWithProjection):
        with merge_tokens(around, CONFIGS[0]), torch.no_grad():
            found = around(pixel_values=pixels, output_hidden_states=True)
        lengths = CONFIGS[0].lengths(PATCHES, LAYERS)
        assert [h.shape[1] - 1 for h in found.hidden_states] == list(lengths)
        return
    text = outputs(around, pixels)[-2:]
    with merge_tokens(around, CONFIGS[0]):
        image = embed(around, pixels)
        _, logits, _, image_embeds, *found = outputs(around, pixels)
    assert equal(found, text)
    normed = image / image.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(image_embeds, normed)
    scores = normed @ found[0].T * around.logit_scale.exp() + getattr(around, "logit_bias", 0)
    torch.testing.assert_close(logits, scores)


@pytest.mark.parametrize("config", [MergeConfig(ratio=1.0), MergeConfig(tokens=PATCHES)])
def test_merging_nothing_changes_no_bit(config, around, pixels):
    plain = outputs(around, pixels)
    with merge_tokens(around, config):
        assert equal(outputs(around, pixels), plain)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_remove_gives_everything_back(config, warm, around, pixels):
    twin = copy.deepcopy(around)
    plain = outputs(twin, pixels)
    if warm:
        outputs(around, pixels)
    before, names = fingerprint(around), list(around.state_dict())
    apply(around, config)
    assert applied(around) == config and around.config.token_merging == config.to_dict()
    if warm:
        outputs(around, pixels)
    remove(around)
    assert fingerprint(around) == before and list(around.state_dict()) == names
    assert applied(around) is None and equal(outputs(around, pixels), plain)


def test_a_batch_is_as_its_images_alone(around, pixels):
    with merge_tokens(around, CONFIGS[0]):
        together = embed(around, pixels)
        single = torch.cat([embed(around, image[None]) for image in pixels])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-5)


def test_a_saved_config_is_taken_up(around, pixels, tmp_path):
    with merge_tokens(around, CONFIGS[0]):
        expected = outputs(around, pixels)
        around.save_pretrained(tmp_path)
    loaded = type(around).from_pretrained(tmp_path).eval()
    assert not equal(outputs(loaded, pixels), expected)
    apply(loaded)
    assert applied(loaded) == CONFIGS[0] and equal(outputs(loaded, pixels), expected)
    with pytest.raises(ValueError, match=f"holds a model of type '{loaded.config.model_type}'"):
        load(str(tmp_path))


def test_an_inner_context_gives_the_outer_config_back(around, pixels):
    with merge_tokens(around, CONFIGS[0]):
        outer = outputs(around, pixels)
        with merge_tokens(around, MergeConfig(tokens=4)):
            assert not equal(outputs(around, pixels), outer)
        assert equal(outputs(around, pixels), outer) and applied(around) == CONFIGS[0]


@pytest.mark.parametrize(
    "config", [MergeConfig(prefix=9), MergeConfig(decoder={0: 0.5}), MergeConfig.recipe("best", tokens=9)]
)
def test_places_after_the_tower_are_refused(config, around):
    before = fingerprint(around)
    with pytest.raises(ValueError, match=f"no language model to merge in, nor has a {type(around).__name__}"):
        apply(around, config)
    assert fingerprint(around) == before


def test_a_processor_without_placeholders_is_refused(around, processor):
    with pytest.raises(ValueError, match="writes no image placeholders"):
        apply(around, CONFIGS[0], processor.image_processor)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_tower(checkpointing, around, pixels):
    around.train()
    if checkpointing:
        around.gradient_checkpointing_enable({"use_reentrant": False})
    with merge_tokens(around, CONFIGS[0]):
        around.vision_model(pixels).pooler_output.square().sum().backward()
    gradient = around.vision_model.encoder.layers[0].mlp.fc1.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_other_attributes_named_vision_model_are_not_taken(around):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model = around.vision_model

    with pytest.raises(UnsupportedModelError, match=r"Other is not supported.*CLIPVisionModelWithProjection"):
        apply(Other(), CONFIGS[0])


# LlavaModel


def headless(tower="clip"):
    """A LlavaModel, and the LlavaForConditionalGeneration with the same weights."""
    whole = make_model(tower)
    return copy.deepcopy(whole).model, whole


def states(model, inputs, **options):
    """Its last hidden states (B, T, D)."""
    with torch.no_grad():
        return model(**inputs, **options).last_hidden_state


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("config", RECIPES)
def test_a_llava_model_computes_what_the_whole_one_does(config, tower, pictures):
    from conftest import make_processor

    (model, whole), processor = headless(tower), make_processor(tower)
    own = make_processor(tower)
    with merge_tokens(whole, config, processor):
        inputs = batch(processor, PROMPTS, pictures)
        with torch.no_grad():
            expected = whole(**inputs, output_hidden_states=True)
    with merge_tokens(model, config, own) as handle:
        again = batch(own, PROMPTS, pictures)
        assert torch.equal(again.input_ids, inputs.input_ids)
        found = states(model, again)
        assert handle.plans() or config.resize
    assert torch.equal(whole.lm_head(found), expected.logits)


@pytest.mark.parametrize("config", RECIPES)
def test_a_llava_model_decodes_from_its_cache_as_the_whole_one(config, processor, pictures):
    model, whole = headless()
    tokens = torch.tensor([[5], [8]])
    logits = []
    for each in (whole, model):
        with merge_tokens(each, config, processor), torch.no_grad():
            inputs = single(processor, PROMPTS[0], pictures)
            cache, mask = None, inputs.attention_mask
            call = dict(inputs)
            for token in tokens:
                cache = each(**call, past_key_values=cache, use_cache=True).past_key_values
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                call = {"input_ids": token[None], "attention_mask": mask}
            out = each(**call, past_key_values=cache, use_cache=True)
            logits.append(out.logits if each is whole else whole.lm_head(out.last_hidden_state))
    assert torch.equal(logits[1], logits[0])


@pytest.mark.parametrize("config", [MergeConfig(ratio=1.0), MergeConfig(ratio=1.0, decoder={0: 1.0})])
def test_a_llava_model_that_merges_nothing_changes_no_bit(config, processor, pictures):
    model, _ = headless()
    plain = states(model, batch(processor, PROMPTS, pictures))
    with merge_tokens(model, config, processor):
        assert torch.equal(states(model, batch(processor, PROMPTS, pictures)), plain)


@pytest.mark.parametrize("config", RECIPES)
def test_a_llava_model_is_given_back(config, processor, pictures):
    model, _ = headless()
    plain = states(model, batch(processor, PROMPTS, pictures))
    before, names = fingerprint(model), list(model.state_dict())
    with merge_tokens(model, config, processor):
        states(model, batch(processor, PROMPTS, pictures))
        assert applied(model) == config
    assert fingerprint(model) == before and list(model.state_dict()) == names
    assert applied(model) is None
    assert torch.equal(states(model, batch(processor, PROMPTS, pictures)), plain)


@pytest.mark.parametrize("config", RECIPES)
def test_rows_of_a_llava_model_do_not_depend_on_the_batch(config, processor, pictures):
    model, _ = headless()
    with merge_tokens(model, config, processor):
        together = states(model, batch(processor, PROMPTS, pictures))
        for row, prompt in zip(together, PROMPTS):
            alone = states(model, single(processor, prompt, pictures))[0]
            torch.testing.assert_close(row[-1], alone[-1], rtol=0, atol=1e-4)


def test_a_llava_model_from_auto_model_takes_up_its_saved_config(processor, pictures, tmp_path):
    whole, config = make_model(), MergeConfig(tokens=5)
    with merge_tokens(whole, config, processor):
        inputs = batch(processor, PROMPTS, pictures)
        with torch.no_grad():
            expected = whole(**inputs).logits
        whole.save_pretrained(tmp_path / "whole")
    model = AutoModel.from_pretrained(tmp_path / "whole").eval()
    assert type(model).__name__ == "LlavaModel"
    apply(model)
    assert applied(model) == config
    assert torch.equal(whole.lm_head(states(model, inputs)), expected)
    model.save_pretrained(tmp_path / "headless")
    again = AutoModel.from_pretrained(tmp_path / "headless").eval()
    apply(again)
    assert torch.equal(states(again, inputs), states(model, inputs))
    with pytest.raises(ValueError, match="holds a LlavaModel, which has no language model head"):
        load(str(tmp_path / "headless"))


@pytest.mark.parametrize("config", [MergeConfig(tokens=5), MergeConfig(decoder={0: 0.5})])
def test_a_llava_model_is_traced_and_its_flops_have_no_head(config, processor, pictures):
    model, whole = headless()
    traced = [trace_image(m, processor, pictures[0], config, "<image> what is") for m in (model, whole)]
    places = [[(m.place, m.layer, m.after.tokens) for m in t.trace.merges] for t in traced]
    assert places[0] == places[1]
    assert all(torch.equal(*(m.after.slot for m in pair)) for pair in zip(*(t.trace.merges for t in traced)))
    inputs = single(processor, PROMPTS[0], pictures)
    head = 2 * whole.lm_head.weight.numel()
    lengths = (PATCHES,) * LAYERS
    assert counted(whole, inputs).total - counted(model, inputs).total == head
    both = [closed_form(m, lengths, 4).total for m in (model, whole)]
    assert both[1] - both[0] == head


def test_a_llava_model_with_another_patch_size_than_its_processor_is_refused(processor):
    processor.patch_size = PATCH + 1
    with pytest.raises(ValueError, match=f"patch_size={PATCH + 1}, the model {PATCH}"):
        apply(headless()[0], MergeConfig(tokens=5), processor)


# One model inside another


def inner_models():
    yield "LlavaForConditionalGeneration", make_model, lambda model: model.model
    yield "LlavaForConditionalGeneration", make_model, lambda model: model.model.vision_tower
    yield "LlavaModel", lambda: make_model().model, lambda model: model.vision_tower
    for name, make in MAKERS.items():
        yield name, make, lambda model: model.vision_model


def tokens(tower, pixels):
    with torch.no_grad():
        return tower(pixels, output_hidden_states=True).hidden_states[-2].shape[1]


def tower_of(model):
    return (
        model.vision_model if hasattr(model, "vision_model") else getattr(model, "model", model).vision_tower
    )


@pytest.mark.parametrize(("name", "make", "part"), list(inner_models()))
def test_a_part_of_a_merging_model_is_neither_removed_nor_applied(name, make, part, pixels):
    model = make().eval()
    inner, config = part(model), MergeConfig(ratio=0.8)
    apply(model, config)
    count = tokens(tower_of(model), pixels)
    with merge_tokens(model, MergeConfig(tokens=4)):
        assert tokens(tower_of(model), pixels) < count
    for call in (
        remove,
        lambda m: apply(m, MergeConfig(tokens=4)),
        lambda m: merge_tokens(m, config).__enter__(),
    ):
        with pytest.raises(ValueError, match=f"merges as that of a {name}: remove that first"):
            call(inner)
    assert applied(model) == config and tokens(tower_of(model), pixels) == count
    remove(model)
    assert applied(model) is None and not hasattr(model.config, "token_merging")


@pytest.mark.parametrize(("name", "make", "part"), list(inner_models()))
def test_a_model_around_a_merging_one_is_not_applied_and_removes_it(name, make, part, pixels):
    model = make().eval()
    inner, config = part(model), MergeConfig(ratio=0.8)
    apply(inner, config)
    count = tokens(tower_of(model), pixels)
    with pytest.raises(ValueError, match=f"of this {name} merges as that of a .*: remove that first"):
        apply(model, MergeConfig(tokens=4))
    assert applied(inner) == config and tokens(tower_of(model), pixels) == count
    remove(model)
    assert applied(inner) is None and not hasattr(inner.config, "token_merging")
    assert tokens(tower_of(model), pixels) > count


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("name", "make", "part"), list(inner_models()))
def test_copies_tell_their_parts_apart_too(name, make, part, copies, pixels):
    model, config = make().eval(), MergeConfig(ratio=0.8)
    for applied_to, other in ((lambda m: m, part), (part, lambda m: m)):
        apply(applied_to(model), config)
        whole = copy.deepcopy(model) if copies else model
        count = tokens(tower_of(whole), pixels)
        with pytest.raises(ValueError, match="remove that first"):
            apply(other(whole), MergeConfig(tokens=4))
        assert tokens(tower_of(whole), pixels) == count
        remove(whole)
        assert applied(whole) is None and tokens(tower_of(whole), pixels) > count
        assert not hasattr(whole.config, "token_merging") and not hasattr(part(whole).config, "token_merging")
        remove(model)
        assert applied(model) is None and not hasattr(part(model).config, "token_merging")
