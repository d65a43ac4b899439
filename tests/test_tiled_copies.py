"""Models that cut images into tiles in training, in other precisions, in threads, as copies, compiled."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompts import generate
from test_tower import state
from tiled import features_of, inputs_of, make_tiled, make_tiled_processor, prompts_of

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied

CASES = [
    ("next-llama3", "images"), ("next-video", "videos"), ("onevision-odd", "several images"),
    ("onevision", "images and videos"),
]  # fmt: skip
CONFIGS = {
    "tower": {"ratio": 0.9},
    "shared": {"ratio": 0.8, "prefix_share": 0.5, "newlines": "scaled"},
    "joint": {"ratio": 0.8, "prefix_share": 1.0, "tile_shares": "joint", "method": "tome"},
}


@pytest.fixture(params=CASES, ids=" ".join)
def case(request):
    """A model, its processor and prompts."""
    kind, name = request.param
    return make_tiled(kind), make_tiled_processor(kind), prompts_of(kind)[name]


@pytest.fixture(params=CONFIGS)
def config(request):
    return MergeConfig(**CONFIGS[request.param])


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model, inputs):
    """The loss and the gradients of the tower's, the projector's and the language model's weights."""
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_every_part_also_when_layers_are_checkpointed(case, config):
    model, processor, prompts = case
    with merge_tokens(model.train(), config, processor):
        inputs = inputs_of(processor, prompts)
        loss, expected = gradients(model, inputs)
        for part in ("patch_embedding", "encoder.layers.0.", "multi_modal_projector", "language_model"):
            assert any(part in name and bool(grad.abs().sum() > 0) for name, grad in expected.items()), part
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        again, found = gradients(model, inputs)
    assert torch.equal(loss, again) and found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_ratio_of_1_are_those_of_the_stock_model(case):
    model, processor, prompts = case
    inputs = inputs_of(processor, prompts)
    _, expected = gradients(model, inputs)
    with merge_tokens(model, MergeConfig(ratio=1.0), processor):
        _, found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_merge_alike(case, config, dtype):
    model, processor, prompts = case
    model.to(dtype)
    before = state(model)
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = inputs_of(processor, prompts).to(dtype)
        assert all(x.dtype == dtype and x.isfinite().all() for x in features_of(model, inputs))
        answers = generate(model, inputs, 2)
        assert answers.shape == (len(prompts), 2)
    assert state(model).keys() == before.keys()
    with merge_tokens(model, MergeConfig(ratio=1.0), processor):
        inputs = inputs_of(processor, prompts).to(dtype)
        found = logits(model, inputs)
    assert torch.equal(found, logits(model, inputs))


def test_autocast_gives_finite_logits(case, config):
    model, processor, prompts = case
    with merge_tokens(model, config, processor), torch.autocast("cpu", torch.bfloat16):
        assert logits(model, inputs_of(processor, prompts)).isfinite().all()


@pytest.mark.parametrize("first", [True, False])
def test_lora_trains_and_merges_as_the_plain_model_at_first(case, config, first):
    model, processor, prompts = case
    with merge_tokens(model, config, processor):
        expected = logits(model, inputs_of(processor, prompts))
    lora = LoraConfig(r=2, target_modules=r".*(q_proj|o_proj|linear_1)", modules_to_save=["lm_head"])
    if first:
        apply(model, config, processor)
    wrapped = get_peft_model(model, lora)
    if not first:
        apply(wrapped, config, processor)
    inputs = inputs_of(processor, prompts)
    assert torch.equal(logits(wrapped.eval(), inputs), expected)
    loss, grads = gradients(wrapped, inputs)
    assert loss.isfinite() and all("lora" in name or "lm_head" in name for name in grads)
    assert torch.equal(generate(wrapped, inputs, 2), generate(model, inputs, 2))
    remove(wrapped)
    assert applied(wrapped) is None


@pytest.mark.parametrize("part", ["multi_modal_projector", "vision_tower"])
def test_parts_that_peft_copies_merge(case, config, part):
    model, processor, prompts = case
    with merge_tokens(model, config, processor):
        expected = logits(model, inputs_of(processor, prompts))
    lora = LoraConfig(r=2, target_modules=r".*language_model.*o_proj", modules_to_save=[part])
    wrapped = get_peft_model(model, lora).eval()
    apply(wrapped, config, processor)
    inputs = inputs_of(processor, prompts)
    assert torch.equal(logits(wrapped, inputs), expected)
    _, grads = gradients(wrapped, inputs)
    assert any("modules_to_save" in name for name in grads)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, inputs), expected)
    remove(wrapped)
    plain = inputs_of(processor, prompts)
    assert torch.equal(logits(wrapped, plain), logits(model, plain))


def test_threads_get_what_they_get_alone(case, config):
    model, processor, prompts = case
    with merge_tokens(model, config, processor):
        works = [inputs_of(processor, [prompt]) for prompt in prompts] + [inputs_of(processor, prompts)]
        alone = [logits(model, inputs) for inputs in works]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: logits(model, inputs), works * 3))
    assert all(map(torch.equal, found, alone * 3))


COPIES = {
    "deepcopy": copy.deepcopy,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "average": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("made", COPIES)
def test_copies_merge_as_the_model_and_stop_alone(case, config, made):
    model, processor, prompts = case
    dense = logits(model, inputs_of(processor, prompts))
    before = state(model)
    apply(model, config, processor)
    inputs = inputs_of(processor, prompts)
    expected = logits(model, inputs)
    other = COPIES[made](model)
    assert applied(other) == config
    assert torch.equal(logits(other, inputs), expected)
    with merge_tokens(other, MergeConfig(ratio=1.0)):
        assert applied(other).ratio == 1 and applied(model) == config
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(other, inputs), expected)
    with torch.no_grad():
        other.model.multi_modal_projector.linear_2.bias += 1
    assert not torch.allclose(logits(other, inputs), expected)  # by its own weights
    assert torch.equal(logits(model, inputs), expected)
    remove(other)
    assert applied(other) is None and applied(model) == config
    assert torch.equal(logits(model, inputs), expected)
    remove(model)
    assert state(model) == before
    assert state(other) == before
    assert torch.equal(logits(model, inputs_of(processor, prompts)), dense)


def test_a_pickled_model_and_processor_merge_as_the_model(case, config):
    model, processor, prompts = case
    apply(model, config, processor)
    other, own = pickle.loads(pickle.dumps((model, processor)))
    assert applied(other) == config
    expected = logits(model, inputs_of(processor, prompts))
    assert torch.equal(logits(other, inputs_of(own, prompts)), expected)
    remove(other)
    assert applied(other) is None and applied(model) == config
    assert not set(vars(other.model)) & {"get_image_features", "get_video_features"}


def test_a_copy_outlives_the_model(case, config):
    model, processor, prompts = case
    apply(model, config, processor)
    expected = logits(model, inputs_of(processor, prompts))
    other, own = copy.deepcopy((model, processor))
    del model, processor
    assert torch.equal(logits(other, inputs_of(own, prompts)), expected)


def test_replicas_merge_as_the_model(case, config):
    """As DataParallel makes them: modules of their own that share the original's attributes."""
    from torch.nn.parallel.replicate import _replicatable_module

    model, processor, prompts = case
    assert _replicatable_module(model)
    with merge_tokens(model, config, processor):
        inputs = inputs_of(processor, prompts)
        expected = logits(model, inputs)
        replicas = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for module, replica in replicas.items():
            replica._parameters = dict(module._parameters)
            for name, child in module._modules.items():
                if child is not None:
                    replica._modules[name] = replicas[child]
        replica = replicas[model]
        called = []
        replicas[model.model.vision_tower].register_forward_pre_hook(lambda *_: called.append(1))
        assert torch.equal(logits(replica, inputs), expected)
        assert called  # its own tower encoded
        assert torch.equal(logits(model, inputs), expected)


def test_a_compiled_language_model_gives_the_same(case):
    model, processor, prompts = case
    with merge_tokens(model, MergeConfig(**CONFIGS["shared"]), processor):
        inputs = inputs_of(processor, prompts)
        expected = logits(model, inputs)
        model.model.language_model.compile(backend="eager")
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-5)
    torch.compiler.reset()
