import copy
import warnings

import pytest
import torch
from conftest import make_model
from precise import ENCODES_FIRST, run
from prompts import PROMPTS, batch, generate, single
from transformers import DynamicCache, LlavaForConditionalGeneration, MistralConfig, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from llava_pitome import MergeConfig, apply, merge_tokens, remove

encodes_first = pytest.mark.skipif(not ENCODES_FIRST, reason="5.17 prefills no pictures in chunks")
CONFIG = MergeConfig(decoder={0: 0.5})


@pytest.fixture
def ran(model):
    """The language model's layers that ran, and the tower's first one."""
    calls = []
    layers = [*model.model.language_model.layers, model.model.vision_tower.encoder.layers[0]]
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


class QuantizedCache(DynamicCache):
    pass


def sliding():
    cache = DynamicCache()
    cache.layers.append(DynamicSlidingWindowLayer(8))
    return cache


CACHES = {
    "StaticCache": lambda m: StaticCache(config=m.config.text_config, max_cache_len=64),
    "QuantizedCache": lambda _: QuantizedCache(),
    "DynamicCache with DynamicSlidingWindowLayer": lambda _: sliding(),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("words", ["picture", "text"])
@pytest.mark.parametrize("config", [CONFIG, MergeConfig(ratio=0.9, llm_proportional=True)], ids=str)
def test_a_cache_that_cannot_hold_layers_of_different_lengths_raises(
    config, words, cache, model, processor, pictures, ran
):
    with merge_tokens(model, config, processor):
        inputs = single(processor, PROMPTS[0] if words == "picture" else "what is this", pictures)
        with pytest.raises(ValueError, match=f"^{cache}.* needs a DynamicCache"):
            model(**inputs, past_key_values=CACHES[cache](model))
    assert not ran


def test_a_static_cache_in_generate_raises_before_the_language_model(model, processor, pictures):
    calls = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, PROMPTS[0], pictures)
        with pytest.raises(ValueError, match=r"^StaticCache .*\(cache_implementation=None\)"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    assert not calls


def test_a_static_cache_in_the_generation_config_raises_in_apply(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generation_config.cache_implementation = "static"
    with pytest.raises(ValueError, match=r"generation_config\.cache_implementation='static'"):
        apply(model, CONFIG)
    apply(model, MergeConfig(prefix=0.5))
    remove(model)


def test_an_implementation_whose_masks_are_unknown_raises_in_apply_and_when_it_is_set_later(
    model, processor, pictures, ran
):
    text = model.model.language_model.config
    with merge_tokens(model, CONFIG, processor):
        inputs, before = single(processor, PROMPTS[0], pictures), text._attn_implementation
        text._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="'flex_attention'; allowed are 'sdpa', 'eager' and flash"):
            model(**inputs)
        text._attn_implementation = before
    text._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention'; allowed are 'sdpa', 'eager' and flash"):
        apply(model, CONFIG)
    assert not ran


def test_a_mask_of_four_dimensions_raises(model, processor, pictures, ran):
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, PROMPTS[0], pictures)
        count = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(1, 1, count, count).tril()
        with pytest.raises(ValueError, match=rf"attention_mask is \(1, 1, {count}, {count}\)"):
            model(**inputs)
        inputs["attention_mask"] = {"full_attention": inputs["attention_mask"]}
        with pytest.raises(ValueError, match="attention_mask is dict"):
            model(**inputs)
    assert not ran


def test_embeddings_instead_of_ids_raise(model, processor, pictures, ran):
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, PROMPTS[0], pictures)
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError, match="needs input_ids, which say where the images are"):
            model(**inputs, inputs_embeds=embedded)
    assert not ran


def test_an_image_that_the_mask_hides_raises(model, processor, pictures):
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, PROMPTS[0], pictures)
        inputs["attention_mask"][0, 3] = 0
        with pytest.raises(ValueError, match="attention_mask hides image tokens"):
            model(**inputs)


def test_packed_prompts_raise(model, processor, pictures, ran):
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, PROMPTS[0], pictures)
        del inputs["attention_mask"]
        count = inputs["input_ids"].shape[1]
        whole = torch.arange(count)[None]
        again = torch.cat([whole[:, : count - 2], whole[:, :2]], 1)
        with pytest.raises(ValueError, match=r"position_ids .* start again .* one prompt per row"):
            model(**inputs, position_ids=again, use_cache=False)
        assert not ran
        model(**inputs, position_ids=whole, use_cache=False)


@encodes_first
@pytest.mark.parametrize("size", [20, 5])
def test_chunks_that_cut_an_image_raise(size, model, processor, pictures):
    calls = []
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, "what is this <image> a cat", pictures)
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=r"not whole images of 36: .* in chunks that cut one"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size)
    assert not calls


@encodes_first
def test_chunks_of_whole_images_and_of_text_answer_as_one_prefill(model, processor, pictures):
    with merge_tokens(model, CONFIG, processor):
        inputs = single(processor, "what is <image> this or that a red cat", pictures)
        expected = generate(model, inputs)
        found = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, prefill_chunk_size=38
        )
        assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)


def test_arguments_may_come_by_position(model, processor, pictures):
    with merge_tokens(model, CONFIG, processor), torch.no_grad():
        inputs = single(processor, PROMPTS[0], pictures)
        expected = model.model(**inputs).last_hidden_state
        out = model.model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        assert torch.equal(out.last_hidden_state, expected)
        assert out.past_key_values.layers[1].keys.shape[2] == 18 + 3
        words = torch.tensor([[5, 6, 7]])
        language = model.model.language_model
        assert torch.equal(language(words).last_hidden_state, model.model(words).last_hidden_state)


# What apply refuses


@pytest.mark.parametrize("layer", [2, 3, 99])
def test_a_layer_with_none_behind_it_or_that_is_not_there_raises(layer, model):
    with pytest.raises(ValueError, match=f"decoder names layer {layer}; .* 3 layers.* allowed are 0 to 1"):
        apply(model, MergeConfig(decoder={layer: 0.5}))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"decoder": {0: 37}}, r"decoder\[0\]=37 does not fit: 36 tokens remain, allowed is 1 to 36"),
        ({"decoder": {0: 0.5, 1: 19}}, r"decoder\[1\]=19 does not fit: 18 tokens"),
        ({"tokens": 9, "decoder": {0: 10}}, r"decoder\[0\]=10 does not fit: 9 tokens"),
        ({"prefix": 37}, r"prefix=37 does not fit: 36 tokens"),
        ({"ratio": 0.9, "prefix": 20}, r"prefix=20 does not fit: 19 tokens"),
        ({"resize": (7, 6)}, r"resize=\(7, 6\) does not fit: this image has 36 patches"),
        ({"resize": (4, 4), "tokens": 17}, r"tokens=17 does not fit: this image has 16 patches"),
    ],
)
def test_more_tokens_than_there_are_raise_in_apply(config, message, model, processor):
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=message):
        apply(model, MergeConfig(**config), processor)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [
        {"decoder": {0: 0.5}},
        {"prefix": 0.5},
        {"tokens": 9, "prefix_share": 0.5},
        {"ratio": 0.9, "llm_proportional": True},
    ],
)
def test_a_tower_alone_has_nothing_behind_it(config, model):
    with pytest.raises(ValueError, match="has no projector and no language model"):
        apply(model.model.vision_tower, MergeConfig(**config))


def with_text(text):
    config = make_model().config
    config.text_config = text
    return LlavaForConditionalGeneration(config)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 17, "pad_token_id": 3}  # fmt: skip


def test_a_sliding_window_raises():
    with pytest.raises(ValueError, match="sliding_window=16; merge in the tower"):
        apply(with_text(MistralConfig(**SMALL, sliding_window=16)), CONFIG)


@pytest.mark.parametrize("kind", ["GraniteConfig", "Gemma2Config", "Glm4Config", "Qwen3Config", "Phi3Config"])
def test_a_language_model_of_another_build_raises(kind):
    import transformers

    model = with_text(getattr(transformers, kind)(**SMALL | {"head_dim": 8}))
    with pytest.raises(ValueError, match=f"inside a {kind[:-6]}Model; supported are .*Llama.*prefix instead"):
        apply(model, CONFIG)
    with merge_tokens(model, MergeConfig(prefix=0.5)) as merging:
        assert merging.language_model is None


def test_pictures_and_images_that_do_not_match_raise(model, processor, pictures):
    with merge_tokens(model, MergeConfig(ratio=0.9, decoder={0: 0.5}), processor):
        inputs = batch(processor, PROMPTS, pictures)
        inputs["pixel_values"] = inputs["pixel_values"][:3]
        with pytest.raises(ValueError, match="do not match"):
            model(**inputs)
        inputs = batch(processor, PROMPTS, pictures)
        assert run(model, inputs).logits.isfinite().all()
