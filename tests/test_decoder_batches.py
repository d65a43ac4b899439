import pytest
import torch
from conftest import make_model, make_processor
from precise import CLOSE, ENCODES_FIRST, alone, answer, padded, precise, run
from prompts import IMAGE, batch

from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.hooks import prompt_layout

ROWS = [
    "<image> what is this",
    "a red <image> cat or <image> dog",
    "two red cat",
    "what is <image>",
    "<image> <image> and this",
    "a dog or two red <image> <image>",
]
REPEATED = [  # transformers 5.17 mixes up the pictures of a prompt that it repeats
    row for row in ROWS if ENCODES_FIRST or row.count("<image>") < 2
]
FITTING = [m for m in METHODS if "decoder" in METHODS[m].places and m != "grid"]
BLIND = [m for m in FITTING if not METHODS[m].needs]  # what they choose does not depend on the words after
CONFIGS = [
    *(MergeConfig(method=m, decoder={0: 0.5, 1: 3}) for m in FITTING),
    *(MergeConfig(method=m, decoder={1: 0.4}, site="block", llm_proportional=True) for m in FITTING),
    MergeConfig(method="grid", decoder={1: 7}),
    MergeConfig(ratio=0.9, prefix=0.5, decoder={0: 0.5, 1: 2}, llm_proportional=True),
    MergeConfig(tokens=9, prefix_share=0.5, llm_proportional=True),
    MergeConfig(tokens=9, decoder={0: 0.3}, metric="hidden", llm_proportional=True),
]


def name(config):
    return " ".join(
        f"{k}={v}" for k, v in config.to_dict().items() if v != MergeConfig(ratio=1.0).to_dict()[k]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "config, kernel",
    [(c, "sdpa") for c in CONFIGS] + [(c, "eager") for c in CONFIGS if c.method in ("pitome", "fastv")],
    ids=lambda value: value if isinstance(value, str) else name(value),
)
def test_a_row_is_what_it_is_alone(config, side, kernel, pictures):
    model, processor, close = (
        make_model(attn_implementation=kernel),
        make_processor(),
        {"rtol": 0, "atol": 2e-4},
    )
    if (
        kernel == "sdpa"
    ):  # eager's softmax is float32, and not a number where a whole row is masked in float64
        model, close = precise(model), CLOSE
    with merge_tokens(model, config, processor):
        inputs = padded(processor, ROWS, pictures, side)
        out = run(model, inputs)
        for row, prompt in enumerate(ROWS):
            found = run(model, alone(processor, prompt, pictures))
            real = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(out.logits[row, real], found.logits[0], **close)
            for here, there in zip(out.past_key_values.layers, found.past_key_values.layers):
                count = there.keys.shape[2]
                part = slice(-count, None) if side == "left" else slice(count)
                torch.testing.assert_close(here.keys[row, :, part], there.keys[0], **close)
                torch.testing.assert_close(here.values[row, :, part], there.values[0], **close)
        lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        alone_lengths = [
            run(model, alone(processor, p, pictures)).past_key_values.layers[-1].keys.shape[2] for p in ROWS
        ]
        assert lengths[-1] == max(alone_lengths)  # no column of padding alone


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.site == "attention"], ids=name)
def test_every_row_is_answered_as_alone(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, config, processor):
        found = answer(model, padded(processor, ROWS, pictures))
        for row, prompt in enumerate(ROWS):
            assert torch.equal(found[row], answer(model, alone(processor, prompt, pictures))[0])


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.method in BLIND], ids=name)
def test_answers_do_not_depend_on_the_cache(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, config, processor):
        inputs = padded(processor, ROWS, pictures)
        assert torch.equal(answer(model, inputs), answer(model, inputs, use_cache=False))


SIZED = [CONFIGS[0], *(c for c in CONFIGS if c.llm_proportional and c.method == "pitome")]


@pytest.mark.parametrize("config", SIZED, ids=name)
def test_beams_answer_as_without_a_cache_and_as_alone(config, pictures):
    model, processor = precise(make_model()), make_processor()
    options = {"num_beams": 3, "num_return_sequences": 2}
    with merge_tokens(model, config, processor):
        inputs = padded(processor, REPEATED, pictures)
        found = answer(model, inputs, **options)
        assert torch.equal(
            found, answer(model, padded(processor, REPEATED, pictures), use_cache=False, **options)
        )
        for row, prompt in enumerate(REPEATED):
            own = answer(model, alone(processor, prompt, pictures), **options)
            assert torch.equal(found[2 * row : 2 * row + 2], own)
        assert not torch.equal(found[::2], answer(model, inputs))  # beams found something else


@pytest.mark.parametrize("config", SIZED, ids=name)
def test_several_sequences_of_a_prompt_are_drawn_as_from_a_repeated_batch(config, pictures):
    model, processor = precise(make_model()), make_processor()
    drawn = {"do_sample": True, "top_k": 0, "temperature": 0.7}
    with merge_tokens(model, config, processor):
        torch.manual_seed(3)
        found = answer(model, padded(processor, REPEATED, pictures), num_return_sequences=3, **drawn)
        repeated = [prompt for prompt in REPEATED for _ in range(3)]
        torch.manual_seed(3)
        assert torch.equal(found, answer(model, padded(processor, repeated, pictures), **drawn))
        assert len(found.unique(dim=0)) > len(REPEATED)


@pytest.mark.parametrize("config", SIZED, ids=name)
def test_tokens_that_are_guessed_and_taken_back_change_no_answer(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, config, processor):
        inputs = alone(processor, "what is this cat <image> what is this dog or two and this", pictures)
        expected = answer(model, inputs, 12)
        assert torch.equal(answer(model, inputs, 12, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_padding_spoils_no_row_in_half_precision(kernel, norms, autocast, pictures):
    model, processor = make_model(attn_implementation=kernel), make_processor()
    config = MergeConfig(decoder={0: 0.5, 1: 0.5}, llm_proportional=True, method="fastv")
    if not autocast:
        model.bfloat16()
        model.model.language_model.norm.to(norms)
    with merge_tokens(model, config, processor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        inputs = batch(processor, ROWS, pictures)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        if norms == torch.float32 and not autocast:
            model.lm_head.float()
        out = run(model, inputs)
        for row in range(len(ROWS)):
            assert out.logits[row, inputs["attention_mask"][row].bool()].isfinite().all()
        assert all(layer.keys.isfinite().all() for layer in out.past_key_values.layers)


def test_images_may_be_anywhere_and_survivors_keep_raster_order(model, processor, pictures, monkeypatch):
    made, shorten = [], prompt_layout.shorten
    monkeypatch.setattr(prompt_layout, "shorten", lambda *a: made.append(shorten(*a)) or made[-1])
    with merge_tokens(model, MergeConfig(order="method", decoder={0: 5}), processor):
        inputs = batch(processor, ROWS, pictures)
        short = run(model, inputs).past_key_values.layers[1].keys
    origin, real = made[-1].after.origin, made[-1].after.real
    assert short.shape[2] == origin.shape[1]
    assert (origin.masked_fill(~real, -1).diff(dim=1)[real[:, 1:]] > 0).all()  # raster order
    ids = inputs["input_ids"].gather(1, origin)
    assert [(row[here] == IMAGE).sum().item() for row, here in zip(ids, real)] == [5, 10, 0, 5, 10, 10]
