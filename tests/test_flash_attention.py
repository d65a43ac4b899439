"""Proportional attention under kernels that take no mask: equal to the masked form.

A stand-in for flash attention computes plain SDPA row by row and refuses additive masks. flash_attention_2
itself needs a GPU: the last test.
"""

import pytest
import torch
from conftest import make_model, make_processor
from prompts import PROMPTS, batch, generate
from torch.nn import functional as F

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.hooks.attention_capture import add_size_channel

NAME = "flash_attention_stand_in"
CONFIGS = [
    MergeConfig(ratio=0.8),
    MergeConfig(ratio=0.8, proportional=False),
    MergeConfig.recipe("best", tokens=9),
    MergeConfig(tokens=20, decoder={0: 0.5, 1: 4}, llm_proportional=True),
    MergeConfig(decoder={0: 0.5}, positions="original"),
    MergeConfig(method="fastv", decoder={1: 0.5}),
]


def stand_in(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, **_kwargs):
    assert module.config._attn_implementation == NAME, "the kernel reads its own name from the config"
    assert query.shape[-1] % 8 == 0, "flash attention takes head dimensions that are multiples of 8"
    causal = module.is_causal if is_causal is None else is_causal
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    count, total = query.shape[2], key.shape[2]
    visible = torch.ones(count, total, dtype=torch.bool)
    if causal:
        visible = visible.tril(total - count)
    out = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for row in range(len(query)):
        real = torch.ones(total, dtype=torch.bool)
        if attention_mask is not None:
            assert attention_mask.shape == (len(query), total), "a padding mask, nothing else"
            real = attention_mask[row].bool()
        mask = visible & real
        mask[real[-count:].logical_not()] = True  # rows of padding: anything but NaN
        out[row] = F.scaled_dot_product_attention(
            query[row], key[row], value[row], attn_mask=mask, scale=scaling
        )
    return out.transpose(1, 2), None


@pytest.fixture(autouse=True)
def registered():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, stand_in)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)


def flash_model(tower="clip"):
    model = make_model(tower)
    model.model.vision_tower.config._attn_implementation = NAME
    model.model.language_model.config._attn_implementation = NAME
    return model


@pytest.mark.parametrize("channels", [8, 15, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_more_channel_is_a_bias(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 10, channels, generator=generator).to(dtype) for _ in range(3))
    sizes = torch.randint(1, 300, (2, 10), generator=generator).float()
    bias = sizes.log().to(dtype)[:, None, None]
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    wider = add_size_channel(query, key, value, sizes.log(), channels**-0.5)
    found = F.scaled_dot_product_attention(*wider, scale=channels**-0.5)[..., :channels]
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-2 if dtype == torch.bfloat16 else 1e-5)
    assert all(x.shape[-1] % 8 == 0 for x in wider)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_without_masks_the_logits_are_those_with_masks(tower, config, side, pictures):
    processor, found = make_processor(tower), []
    processor.tokenizer.padding_side = side
    for model in (make_model(tower), flash_model(tower)):
        with merge_tokens(model, config, processor), torch.no_grad():
            inputs = batch(processor, PROMPTS, pictures)
            found.append(model(**inputs).logits[inputs.attention_mask.bool()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_without_masks_the_answers_are_those_with_masks(config, pictures):
    processor, found = make_processor(), []
    for model in (make_model(), flash_model()):
        with merge_tokens(model, config, processor):
            found.append(generate(model, batch(processor, PROMPTS, pictures)))
            found.append(generate(model, batch(processor, PROMPTS[:1], pictures[:1])))  # no padding
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_remove_gives_the_implementations_back():
    model = flash_model()
    apply(model, CONFIGS[3])
    configs = model.model.vision_tower.config, model.model.language_model.config
    assert all(c._attn_implementation != NAME for c in configs)
    remove(model)
    assert all(c._attn_implementation == NAME for c in configs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash_attention_2 needs a CUDA GPU")
def test_flash_attention_2_computes_what_sdpa_does(pictures):
    processor, found = make_processor(), []
    for name in ("sdpa", "flash_attention_2"):
        model = make_model(attn_implementation=name).to("cuda", torch.bfloat16)
        with merge_tokens(model, MergeConfig.recipe("best", tokens=9), processor), torch.no_grad():
            inputs = batch(processor, PROMPTS, pictures).to("cuda", torch.bfloat16)
            found.append(model(**inputs).logits[inputs.attention_mask.bool()].float())
    torch.testing.assert_close(*found, rtol=0, atol=0.1)
