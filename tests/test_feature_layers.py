"""LLaVAs whose features join hidden states of several layers of the tower: Vip-LLaVA, LLaVA with a list."""

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor, make_vip_llava
from precise import CLOSE, ENCODES_FIRST, alone, answer, padded, precise
from prompts import IMAGE, PROMPTS, RECIPES, batch, generate, single
from test_tower import images, state
from torch import nn

from llava_pitome import METHODS, MergeConfig, merge_tokens

BEST = MergeConfig.recipe("best", tokens=6)
MODELS = {  # the last feature layer first, in the middle and last; the embeddings; one layer twice
    "vip": make_vip_llava,
    "vip, 4 layers": lambda: make_vip_llava([3, -1, 0, -3]),
    "list": lambda: make_model(vision_feature_layer=[2, 4, -2]),
    "list, class token": lambda: make_model(
        vision_feature_layer=[-2, 0, -2], vision_feature_select_strategy="full"
    ),
    "siglip": lambda: make_model("siglip", vision_feature_layer=[-1, 3]),
}
WHOLE = [*RECIPES, BEST, MergeConfig(ratio=0.9, decoder={0: 0.5}, positions="original")]
IN_TOWER = [m for m in METHODS if "tower" in METHODS[m].places]


def make(name):
    """A model, and a processor that fits it."""
    model, tower = MODELS[name](), "siglip" if name == "siglip" else "clip"
    processor = make_processor(tower)
    processor.vision_feature_select_strategy = getattr(
        model.config, "vision_feature_select_strategy", "default"
    )
    return model, processor


def layers(model):
    """Blocks before each feature layer."""
    config = model.config
    given = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
    return [i % (LAYERS + 1) for i in given]


def encode(model, pixels, **options):
    """What reaches the projector (I, n, channels), and the hidden states after every block."""
    inner, found, states = model.model, [], []
    hooks = [inner.multi_modal_projector.register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    for i, block in enumerate(inner.vision_tower.encoder.layers):
        if i == 0:
            hooks.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
        hooks.append(block.register_forward_hook(lambda _, _args, output: states.append(output)))
    try:
        model.get_image_features(pixel_values=pixels, **options)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0], states


# What the features are


@pytest.mark.parametrize("site", ["attention", "block"])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"metric": "hidden"}, {"proportional": False}, {"method": "tome"}, {"method": "random"},
        {"order": "method"}, {"tokens": 9, "ratio": None}, {"tokens": 1, "ratio": None},
        {"ratio": (1.0, 0.7, 1.0, 1.0, 0.6, 1.0, 0.9)}, {"resize": (4, 5)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("siglip", "vip, 4 layers")])
def test_an_averaged_token_is_the_mean_of_its_patches_in_every_layer(name, change, site):
    model, _ = make(name)
    precise(model)
    config = MergeConfig(**{"ratio": 0.8, "site": site} | change)
    with merge_tokens(model, config) as merging, torch.no_grad():
        features, states = encode(model, images().double())
        tokens, patches = merging.tower.last.tokens, merging.patches()
    slots = [torch.arange(patches).expand(len(features), -1)]  # of each patch before every layer
    for after in tokens[1:]:
        slots.append(slots[-1] if after.plan is None else after.plan.slot.gather(1, slots[-1]))
    joined = []
    for layer in layers(model):
        rows = []
        for x, start, end in zip(states[layer], slots[layer], slots[-1]):
            of_patch = x[1:][start]  # (patches, D): the token that each patch is in there
            rows.append(torch.stack([x[0], *(of_patch[end == t].mean(0) for t in range(int(end.max()) + 1))]))
        joined.append(torch.stack(rows))
    expected = torch.cat(joined, -1)[:, 0 if name == "list, class token" else 1 :]
    assert features.shape[1] < PATCHES
    torch.testing.assert_close(features, expected, **CLOSE)


@pytest.mark.parametrize(
    "config",
    [
        *(MergeConfig(ratio=0.8, method=m) for m in IN_TOWER),
        *(MergeConfig(ratio=0.7, method=m, site="block", metric="hidden") for m in IN_TOWER),
        *(MergeConfig(ratio=0.9, method=m, size_weighted=False) for m in IN_TOWER),
        MergeConfig.recipe("released", ratio=0.8), MergeConfig.recipe("paper", tokens=5),
        MergeConfig(tokens=5, resize=(4, 5)),
        MergeConfig(ratio=0.8, method="tofu", early_method="pitome", early_depth=0.5),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["list, class token", "siglip"])
def test_every_method_combines_tokens_alike_in_every_layer(name, config):
    """Blocks that add nothing make all layers equal; they must still be after they have merged."""
    model, _ = make(name)
    for block in model.model.vision_tower.encoder.layers:
        for last in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    with merge_tokens(model, config), torch.no_grad():
        features, states = encode(model, images())
    parts = features.chunk(len(layers(model)), -1)
    assert features.shape[1] < states[0].shape[1]
    for part in parts:
        assert torch.equal(part, parts[layers(model).index(max(layers(model)))])


@pytest.mark.parametrize("config", [MergeConfig(ratio=0.8), MergeConfig(ratio=1.0)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_all_hidden_states_may_be_asked_for(name, config):
    model, _ = make(name)
    with merge_tokens(model, config), torch.no_grad():
        alone, _ = encode(model, images())
        chosen = layers(model)
        for asked in (True, chosen):
            assert torch.equal(encode(model, images(), output_hidden_states=asked)[0], alone)
        out = model.model.vision_tower(images(), output_hidden_states=True).hidden_states
        assert len({out[i].shape for i in chosen}) == 1 and len(out) == LAYERS + 1


# Whole models


@pytest.mark.parametrize(
    "kernel, dtype", [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]
)
@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_changes_no_bit(name, kernel, dtype, pictures):
    model, processor = make(name)
    model.set_attn_implementation(kernel)
    model.to(dtype)
    inputs = batch(processor, PROMPTS, pictures).to(dtype)
    with torch.no_grad():
        expected, said = model(**inputs).logits, generate(model, inputs)
        for config in (MergeConfig(ratio=1.0), MergeConfig(prefix=PATCHES, llm_proportional=True)):
            with merge_tokens(model, config, processor):
                assert torch.equal(batch(processor, PROMPTS, pictures).input_ids, inputs.input_ids)
                real = inputs.attention_mask.bool()
                assert torch.equal(model(**inputs).logits[real], expected[real])
                assert torch.equal(generate(model, inputs), said)


@pytest.mark.parametrize("config", WHOLE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_answers_as_its_rows_alone(name, config, pictures):
    model, processor = make(name)
    precise(model)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = padded(processor, PROMPTS, pictures)
        together, answers = model(**inputs).logits, answer(model, inputs)
        for row, prompt in enumerate(PROMPTS):
            own = alone(processor, prompt, pictures)
            found = model(**own).logits[0]
            torch.testing.assert_close(together[row, -len(found) :], found, rtol=0, atol=1e-5)
            assert torch.equal(answers[row], answer(model, own)[0])


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("config", [WHOLE[1], BEST, WHOLE[-1]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_left_behind(name, config, raises, pictures):
    model, processor = make(name)
    plain = batch(processor, PROMPTS, pictures)
    with torch.no_grad():
        expected, before = model(**plain).logits, state(model)
        try:
            with merge_tokens(model, config, processor):
                generate(model, batch(processor, PROMPTS, pictures))
                if raises:
                    model(**plain)  # too many placeholders
        except ValueError:
            assert raises
        assert state(model) == before
        assert torch.equal(model(**plain).logits, expected)


@pytest.mark.parametrize("config", [WHOLE[0], BEST, WHOLE[-1]], ids=str)
@pytest.mark.parametrize("name", ["vip", "list, class token"])
def test_beams_sequences_and_later_turns_answer_as_without_a_cache(name, config, pictures):
    model, processor = make(name)
    precise(model)
    prompts = [p for p in PROMPTS if ENCODES_FIRST or p.count("<image>") < 2]
    with merge_tokens(model, config, processor), torch.no_grad():
        for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
            inputs = [padded(processor, prompts, pictures) for _ in range(2)]
            found = answer(model, inputs[0], **options)
            assert torch.equal(found, answer(model, inputs[1], use_cache=False, **options))
        first, later = alone(processor, PROMPTS[1], pictures), torch.tensor([[6, 7, 11]])
        cache = model(**first, use_cache=True).past_key_values
        found = model(input_ids=later, past_key_values=cache).logits
        both = first | {"input_ids": torch.cat([first["input_ids"], later], 1)}
        both["attention_mask"] = torch.ones_like(both["input_ids"])
        torch.testing.assert_close(found, model(**both).logits[:, -3:], **CLOSE)


@pytest.mark.parametrize("site", ["attention", "block"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", ["vip", "list"])
def test_the_projector_knows_the_sizes_of_the_tokens_it_is_given(name, last, site, pictures):
    """The merge after it weights them, and reads the keys that the tower left of them."""
    model, processor = make(name)
    config = MergeConfig(ratio=0.9, prefix=5, prefix_metric="keys", site=site)
    with merge_tokens(model, config, processor) as merging, torch.no_grad():
        encoded = [single(processor, PROMPTS[0], pictures[i:])["pixel_values"] for i in range(2)]
        model.get_image_features(pixel_values=encoded[last])
        count, plans = merging.tower.last.tokens[-1].patch_sizes.shape[1], merging.tower.last.plans()
        assert merging.sizes().sum(1).tolist() == [PATCHES] and len(merging.plans()) == len(plans) + 1
        with pytest.raises(RuntimeError, match="did not compute"):
            model.model.multi_modal_projector(torch.zeros(1, count, 32 * len(layers(model))))


# Training


def gradients(model, processor, config, pictures):
    model.zero_grad()
    with merge_tokens(model, config, processor):
        inputs = padded(processor, PROMPTS, pictures, "right")
        model(
            **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
        ).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


CHECKPOINTED = [  # between attention and MLP, reentrant checkpointing is refused: test_checkpointed_passes.py
    (MergeConfig(ratio=0.8), False),
    (MergeConfig(ratio=0.8, site="block"), False),
    (MergeConfig(ratio=0.8, site="block"), True),
    (BEST, False),
]


@pytest.mark.parametrize("config, reentrant", CHECKPOINTED, ids=str)
@pytest.mark.parametrize("name", ["vip", "list"])
def test_checkpointing_changes_no_gradient(name, config, reentrant, pictures):
    model, processor = make(name)
    precise(model).train()
    plain = gradients(model, processor, config, pictures)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, processor, config, pictures)
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("method", IN_TOWER)
def test_gradients_are_the_slope_of_what_is_computed(method, pictures):
    model, _ = make("vip")
    pixels = images(1).double()
    precise(model)
    weight = model.model.vision_tower.encoder.layers[1].mlp.fc2.weight  # before all feature layers
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value():
        features, _ = encode(model, pixels)
        return features.square().mean()

    with merge_tokens(model, MergeConfig(ratio=0.8, method=method)):
        (gradient,) = torch.autograd.grad(value(), weight)
        with torch.no_grad():
            step, values = 1e-6, []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign * step)
                values.append(value())
                weight.sub_(direction, alpha=sign * step)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-9)
