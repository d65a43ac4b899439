import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from precise import CLOSE, alone, padded, precise, run
from prompts import IMAGE, PROMPTS, batch, single
from transformers import LlavaForConditionalGeneration, MistralConfig, Qwen2Config
from written_out import Story

from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.methods import Method
from llava_pitome.methods._common import highest, prune

FITTING = [m for m in METHODS if "decoder" in METHODS[m].places]
CHANGES = [
    {},
    {"decoder": {0: 0.5}},
    {"decoder": {1: 0.3}, "site": "block"},
    {"metric": "hidden"},
    {"site": "block", "metric": "hidden"},
    {"llm_proportional": True},
    {"llm_proportional": True, "size_weighted": False},
    {"llm_proportional": True, "ratio": 0.9, "decoder": {0: 0.5, 1: 3}},
    {"llm_proportional": True, "ratio": 0.9, "decoder": {}},
    {"llm_proportional": True, "prefix": 0.3, "decoder": {}},
    {"prefix": 0.4, "site": "block", "decoder": {0: 0.5, 1: 2}},
    {"ratio": 0.9, "prefix": 8, "decoder": {0: 0.5, 1: 2}},
    {"tokens": 9, "prefix_share": 0.5, "llm_proportional": True, "decoder": {1: 3}},
    {"order": "method"},
    {"parameters": {"margin": 0.2}},
    {"decoder": {0: 1.0, 1: 0.5}},
    {"decoder": {0: PATCHES, 1: 0.5}},
    {"method": "grid", "decoder": {1: 12}},
    *({"method": m} for m in FITTING if m != "grid"),
    *({"method": m, "metric": "hidden", "site": "block", "llm_proportional": True} for m in FITTING
      if m != "grid"),
]  # fmt: skip


def pictured(model, inputs, merging):
    """The features of a prompt's pictures, and the patches that they stand for."""
    with torch.no_grad():
        found = model.get_image_features(inputs["pixel_values"]).pooler_output
    return torch.stack(list(found)), merging.sizes()


def said(model, inputs, past=None):
    with torch.no_grad():
        return model(**inputs, past_key_values=past, use_cache=True, output_hidden_states=True)


def check(out, found, story):
    """Logits, states, keys, values and lengths of a pass of one prompt."""
    torch.testing.assert_close(out.logits[0], found.logits, **CLOSE)
    for layer, state in enumerate(found.states[:-1]):
        torch.testing.assert_close(out.hidden_states[layer + 1][0], state, **CLOSE)
    for layer, cached in enumerate(out.past_key_values.layers):
        assert cached.keys.shape[2] == story.keys[layer].shape[1]
        torch.testing.assert_close(cached.keys[0], story.keys[layer], **CLOSE)
        torch.testing.assert_close(cached.values[0], story.values[layer], **CLOSE)


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("prompt", [0, 1])
def test_the_hooks_compute_what_a_language_model_written_out_does(change, prompt, pictures):
    model, processor = precise(make_model()), make_processor()
    config = MergeConfig(**{"decoder": {0: 0.5, 1: 12}} | change)
    if prompt:  # warm: transformers installs hooks of its own at the first use
        said(model, {"input_ids": torch.tensor([[5]])})
    with merge_tokens(model, config, processor) as merging:
        inputs = alone(processor, PROMPTS[prompt], pictures)
        story = Story(precise(make_model()), config)
        found = story.say(inputs["input_ids"][0], *pictured(model, inputs, merging))
        out = said(model, inputs)
        check(out, found, story)
        for _ in range(3):
            token = found.logits[-1].argmax().item()
            out = said(model, {"input_ids": torch.tensor([[token]])}, out.past_key_values)
            found = story.say([token])
            check(out, found, story)
        words = torch.tensor([[5, 9, 11, 6]])  # a second turn without a picture
        out = said(model, {"input_ids": words}, out.past_key_values)
        check(out, story.say(words[0]), story)
        inputs = alone(processor, PROMPTS[1 - prompt], pictures[1:])  # and a third with pictures
        given = pictured(model, inputs, merging)
        del inputs["attention_mask"]
        out = said(model, inputs, out.past_key_values)
        check(out, story.say(inputs["input_ids"][0], *given), story)


@pytest.mark.parametrize(
    "change",
    [{"site": "block"}, {"metric": "hidden"}, {"llm_proportional": True}, {"size_weighted": False},
     {"method": "fastv"}, {"parameters": {"margin": 0.2}}, {"decoder": {0: 0.5, 1: 0.6}}],
)  # fmt: skip
def test_every_field_changes_what_is_computed(change, model, processor, pictures):
    found = []
    for config in ({}, change):
        with merge_tokens(model, MergeConfig(**{"decoder": {0: 0.5, 1: 0.5}} | config), processor):
            found.append(run(model, single(processor, PROMPTS[1], pictures)).logits[0, -1])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_cache_of_the_layers_behind_is_shorter_and_grows_with_every_token(model, processor, pictures):
    with merge_tokens(model, MergeConfig(decoder={0: 0.5, 1: 2}), processor):
        inputs = processor(images=pictures[0], text="<image> what is this", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths == [36 + 6, 18 + 6, 2 + 6]  # three words, and three tokens that went in again
    assert [layer.values.shape[2] for layer in out.past_key_values.layers] == lengths


# Who attends to whom


@pytest.fixture
def seen(monkeypatch):
    """What a method in the language model is given."""
    passes = []

    class Spy(Method):
        needs = ("received_attention", "last_attention", "text_attention", "text", "text_mask")

        def merge(self, metric, remove, depth=0.0, **given):
            passes.append({"received": given["received_attention"], "last": given["last_attention"],
                           "by text": given["text_attention"], "text": given["text"],
                           "asks": given["text_mask"], "metric": metric})  # fmt: skip
            return prune(highest(given["received_attention"], metric.shape[1] - remove), metric.shape[1])

    monkeypatch.setitem(METHODS, "spy", Spy)
    return passes


def check_attention(found, maps, inputs, states):
    """Against the maps (B, H, T, P + T) of the kernel itself, and the states (B, T, D) after it."""
    count = inputs["input_ids"].shape[1]
    image = 0
    for row, (attention, ids) in enumerate(zip(maps.double().mean(1), inputs["input_ids"])):
        real = inputs["attention_mask"][row, -count:].bool()
        here = torch.arange(count)
        for places in (ids == IMAGE).nonzero().view(-1, PATCHES):
            to = attention[:, -count:][:, places]
            text = real & (ids != IMAGE) & (here > places[0])
            asks = found["asks"][image]
            expected = {"received": to[real].mean(0), "last": to[here[real].max()]}
            for name, values in expected.items():
                torch.testing.assert_close(found[name][image].double(), values, rtol=0, atol=1e-6)
            torch.testing.assert_close(found["by text"][image][asks].double(), to[text], rtol=0, atol=1e-6)
            torch.testing.assert_close(found["text"][image][asks], states[row, text], rtol=0, atol=1e-5)
            torch.testing.assert_close(found["metric"][image], states[row, places], rtol=0, atol=1e-5)
            assert asks.sum() == text.sum()
            image += 1
    assert image == len(found["asks"]) == 4


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("before", [None, "alike", "padded"])
def test_the_attention_that_methods_are_given_is_the_kernels(seen, before, side, kernel, pictures):
    config = MergeConfig(method="spy", decoder={0: 0.5}, metric="hidden", site="attention")
    model, processor = precise(make_model(attn_implementation=kernel)), make_processor()
    plain = precise(make_model(attn_implementation="eager"))
    states = []
    plain.model.language_model.layers[0].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: states.append(args[0])
    )
    inputs, caches = padded(processor, PROMPTS, pictures, side), [None, None]
    with merge_tokens(model, config):
        if before is not None:
            first = torch.tensor([[5, 6, 7]] * 4)
            mask = torch.ones(4, 3, dtype=torch.long)
            if before == "padded":
                mask[1, :2] = mask[3, 0] = 0
            caches = [run(m, {"input_ids": first, "attention_mask": mask}).past_key_values
                      for m in (model, plain)]  # fmt: skip
            inputs["attention_mask"] = torch.cat([mask, inputs["attention_mask"]], 1)
        run(model, inputs, past_key_values=caches[0])
    maps = run(plain, inputs, past_key_values=caches[1], output_attentions=True).attentions[0]
    check_attention(seen[0], maps, inputs, states[-1])


def test_class_tokens_of_images_are_no_text(seen, pictures):
    model, processor = precise(make_model()), make_processor()
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    with merge_tokens(model, MergeConfig(method="spy", decoder={0: 0.5, 1: 0.5}), processor):
        run(model, alone(processor, "a red <image> cat or <image> dog", pictures))
    assert [s["asks"].sum(1).tolist() for s in seen] == [[3, 1], [3, 1]]


# Other language models


@pytest.mark.parametrize("kind", [MistralConfig, Qwen2Config])
def test_kin_of_llama_merge_too(kind, pictures):
    config = make_model().config
    shape = {k: getattr(config.text_config, k) for k in ("hidden_size", "intermediate_size", "vocab_size",
             "num_attention_heads", "num_key_value_heads", "initializer_range")}  # fmt: skip
    config.text_config = kind(**shape, num_hidden_layers=5, sliding_window=None, pad_token_id=3)
    torch.manual_seed(0)
    model, processor = LlavaForConditionalGeneration(config).eval(), make_processor()
    with merge_tokens(model, MergeConfig(decoder={0: 0.5, 3: 0.5}, llm_proportional=True), processor):
        out = run(model, batch(processor, PROMPTS, pictures))
        assert [x.keys.shape[2] for x in out.past_key_values.layers] == [77, 41, 41, 41, 23]
        for row, prompt in enumerate(PROMPTS):
            found = run(model, single(processor, prompt, pictures)).logits[0]
            torch.testing.assert_close(out.logits[row, -len(found) :], found, rtol=0, atol=1e-4)
