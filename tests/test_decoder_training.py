import pytest
import torch
from conftest import make_model, make_processor
from precise import CLOSE, alone, padded, positions, precise
from prompts import IMAGE, PROMPTS

from llava_pitome import METHODS, MergeConfig, merge_tokens

FITTING = [m for m in METHODS if "decoder" in METHODS[m].places and m != "grid"]
CONFIGS = [
    *(MergeConfig(method=m, decoder={0: 0.5, 1: 3}, llm_proportional=True) for m in FITTING),
    MergeConfig(ratio=0.9, prefix=0.5, decoder={0: 0.5}, site="block", metric="hidden"),
    MergeConfig(tokens=9, decoder={1: 2}, llm_proportional=True),
]


def name(config):
    return " ".join(
        f"{k}={v}" for k, v in config.to_dict().items() if v != MergeConfig(ratio=1.0).to_dict()[k]
    )


def labelled(inputs):
    """With labels for words, but for each row's first, which padding on the left would have to predict."""
    ids, place = inputs["input_ids"], positions(inputs["attention_mask"], inputs["input_ids"].shape[1])
    hidden = (ids == IMAGE) | (inputs["attention_mask"] == 0) | (place == 0)
    return inputs | {"labels": ids.masked_fill(hidden, -100), "position_ids": place}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_batch_trains_as_its_rows_do(config, side, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model.train(), config, processor):
        batch = labelled(padded(processor, PROMPTS, pictures, side))
        whole = model(**batch).loss
        together = gradients(model, whole)
        losses, counts = [], []
        for prompt in PROMPTS:
            own = labelled(alone(processor, prompt, pictures))
            counts.append((own["labels"][:, 1:] != -100).sum())
            losses.append(model(**own).loss * counts[-1])
        total = sum(losses) / sum(counts)
        torch.testing.assert_close(whole, total, rtol=0, atol=1e-6)  # the loss itself is float32
        apart = gradients(model, total)
    for part in (
        "vision_tower.encoder.layers.0",
        "multi_modal_projector",
        "language_model.layers.2",
        "lm_head",
    ):
        assert any(part in n and g.abs().sum() > 0 for n, g in together.items()), part
    for key, gradient in apart.items():
        torch.testing.assert_close(together[key], gradient, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_gradient_checkpointing_runs_every_layer_again_and_changes_nothing(config, pictures):
    found, processor = [], make_processor()
    for again in (False, True):
        model, calls = precise(make_model()).train(), []
        for layer in model.model.language_model.layers:
            layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with merge_tokens(model, config, processor) as merging:
            loss = model(**labelled(padded(processor, PROMPTS, pictures, "right"))).loss
            before = [slot and slot.sizes.clone() for slot in merging.language_model.tokens]
            found.append(gradients(model, loss))
            assert len(calls) == (6 if again else 3)
            for slot, sizes in zip(merging.language_model.tokens, before):
                assert torch.equal(slot.sizes, sizes)
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, **CLOSE, msg=key)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_layer_that_runs_again_makes_the_same_and_leaves_the_same(config, pictures):
    """As gradient checkpointing does where it takes a layer's hooks along (transformers before 5.23)."""
    model, processor, calls, made = precise(make_model()), make_processor(), [], []
    with merge_tokens(model, config, processor) as merging:
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(
                lambda _, *given: calls.append(given), with_kwargs=True, prepend=True
            )
            layer.register_forward_hook(lambda _layer, _args, output: made.append(output))
        model(**padded(processor, PROMPTS, pictures), use_cache=False)
        slots, expected = list(merging.language_model.tokens), list(made)
        for layer, (args, kwargs), output in zip(model.model.language_model.layers, calls, expected):
            assert torch.equal(layer(*args, **kwargs), output)
        for slot, before in zip(merging.language_model.tokens, slots):
            assert torch.equal(slot.sizes, before.sizes)


@pytest.mark.parametrize("prompts", [(0, 0), (0, 1), (1, 0)])
def test_two_passes_before_a_backward_with_checkpointing_give_both_gradients(prompts, pictures):
    processor, found = make_processor(), []
    for checkpointing in (False, True):
        model = precise(make_model()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
            both = [alone(processor, PROMPTS[p], pictures[i:]) for i, p in enumerate(prompts)]
            loss = sum(model(**inputs, labels=inputs["input_ids"]).loss for inputs in both)
            found.append(gradients(model, loss))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, **CLOSE, msg=key)


def test_the_loss_is_that_of_the_logits(pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, CONFIGS[0], processor):
        inputs = labelled(padded(processor, PROMPTS, pictures, "right"))
        out = model(**inputs)
        assert out.logits.shape[:2] == inputs["labels"].shape
        expected = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        )
        torch.testing.assert_close(out.loss.double(), expected, rtol=0, atol=1e-6)
