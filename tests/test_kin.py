"""LLaVAs with other parts than LLaVA-1.5: SigLIP and Qwen2 (interleave), Mistral, Llama 3."""

import pytest
import torch
from conftest import LAYERS, PATCHES, VISION, WORDS, make_model, make_processor
from precise import CLOSE, ENCODES_FIRST, alone, answer, padded, precise
from prompts import IMAGE, RECIPES, batch, generate, images_of
from prompts import PROMPTS as USUAL
from test_decoder import check, pictured, said
from test_tower import state
from transformers import LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig
from written_out import Story

from llava_pitome import MergeConfig, load, merge_tokens
from llava_pitome.tracing import trace_image

TEXT = {  # four query heads of two keys, as all of them group heads
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": len(WORDS), "initializer_range": 0.2,
    "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
PROMPTS = [*USUAL, "<image> <image> and <image> what is this"]
CONFIGS = [
    *RECIPES,
    MergeConfig.recipe("best", tokens=6),
    MergeConfig(ratio=0.9, decoder={0: 0.5}, positions="original"),
    MergeConfig(prefix=9, method="visionzip"),
    MergeConfig(method="fastv", decoder={1: 5}),
]


def interleave():
    """As llava-interleave-qwen: the last layer's features of a SigLIP without a pooling head."""
    return make_model(
        "siglip",
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=True),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


MODELS = {
    "interleave": interleave,
    "mistral": lambda: make_model(text_config=MistralConfig(**TEXT, sliding_window=None)),
    "llama 3": lambda: make_model(text_config=LlamaConfig(**TEXT, rope_parameters=LLAMA_3)),
}


def make(name):
    """A model, and a processor that fits it."""
    return MODELS[name](), make_processor("siglip" if name == "interleave" else "clip")


def blocks(name):
    """Blocks of the tower up to the feature layer."""
    return LAYERS if name == "interleave" else LAYERS - 1


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_answers_as_its_rows_alone(name, config, pictures):
    model, processor = make(name)
    precise(model)
    tokens = config.tokens_at(PATCHES, blocks(name))
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = padded(processor, PROMPTS, pictures)
        assert (inputs["input_ids"] == IMAGE).sum(1).tolist() == [
            tokens * p.count("<image>") for p in PROMPTS
        ]
        together, answers = model(**inputs).logits, answer(model, inputs)
        for row, prompt in enumerate(PROMPTS):
            own = alone(processor, prompt, pictures)
            found = model(**own).logits[0]
            torch.testing.assert_close(together[row, -len(found) :], found, rtol=0, atol=1e-5)
            assert torch.equal(answers[row], answer(model, own)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_changes_no_bit_and_nothing_is_left_behind(name, kernel, dtype, pictures):
    model, processor = make(name)
    model.set_attn_implementation(kernel)
    model.to(dtype)
    inputs = batch(processor, PROMPTS, pictures).to(dtype)
    real = inputs.attention_mask.bool()
    with torch.no_grad():
        expected, answers, before = model(**inputs).logits, generate(model, inputs), state(model)
        for config in (MergeConfig(ratio=1.0), MergeConfig(prefix=PATCHES, llm_proportional=True)):
            with merge_tokens(model, config, processor):
                assert torch.equal(model(**inputs).logits[real], expected[real])
                assert torch.equal(generate(model, inputs), answers)
        for config in CONFIGS:
            with merge_tokens(model, config, processor):
                merged = batch(processor, PROMPTS, pictures).to(dtype)
                assert generate(model, merged).shape == answers.shape
            assert state(model) == before
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    "change",
    [{}, {"site": "block", "metric": "hidden"}, {"llm_proportional": True, "ratio": 0.9}, {"method": "fastv"},
     {"tokens": 9, "prefix_share": 0.5, "llm_proportional": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_the_hooks_compute_what_a_language_model_written_out_does(name, change, pictures):
    """Two turns, a picture in the first and three in the second."""
    config = MergeConfig(**{"decoder": {0: 0.5, 1: 3}} | change)
    model, processor = make(name)
    story = Story(precise(make(name)[0]), config)
    with merge_tokens(precise(model), config, processor) as merging:
        inputs = alone(processor, PROMPTS[0], pictures)
        found = story.say(inputs["input_ids"][0], *pictured(model, inputs, merging))
        out = said(model, inputs)
        check(out, found, story)
        inputs = alone(processor, PROMPTS[-1], pictures)
        given = pictured(model, inputs, merging)
        del inputs["attention_mask"]
        out = said(model, inputs, out.past_key_values)
        check(out, story.say(inputs["input_ids"][0], *given), story)


@pytest.mark.parametrize("config", CONFIGS[-4:-2], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_beams_and_sequences_answer_as_without_a_cache(name, config, pictures):
    model, processor = make(name)
    precise(model)
    prompts = [p for p in PROMPTS if ENCODES_FIRST or p.count("<image>") < 2]
    options = {"num_beams": 3, "num_return_sequences": 2}
    with merge_tokens(model, config, processor):
        found = answer(model, padded(processor, prompts, pictures), **options)
        again = answer(model, padded(processor, prompts, pictures), use_cache=False, **options)
        assert torch.equal(found, again) and len(found) == 2 * len(prompts)


@pytest.mark.parametrize("config", CONFIGS[-4:-2], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_gradient(name, config, pictures):
    found = []
    for again in (False, True):
        model, processor = make(name)
        precise(model).train()
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with merge_tokens(model, config, processor):
            inputs = padded(processor, PROMPTS, pictures, "right")
            labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
            model(**inputs, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("vision_tower" in n for n in found[0])
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, **CLOSE, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_and_traced(name, pictures, tmp_path):
    model, processor = make(name)
    config = CONFIGS[-3]
    with merge_tokens(model, config, processor):
        expected = generate(model, batch(processor, PROMPTS, pictures))
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    loaded, own = load(str(tmp_path))
    assert torch.equal(generate(loaded, batch(own, PROMPTS, pictures)), expected)
    lengths = config.lengths(PATCHES, blocks(name))
    trace = trace_image(model, processor, *images_of(PROMPTS[0], pictures), config, PROMPTS[0]).trace
    assert [trace.after("tower", i).tokens for i in range(blocks(name))] == list(lengths[1:])
