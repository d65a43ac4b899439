"""What forward passes leave behind, and what a model's hooks share: nothing."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import PATCHES, make_model
from prompts import PROMPTS, RECIPES, batch, single
from test_tower import features, images, state
from torch.utils._python_dispatch import TorchDispatchMode

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied
from llava_pitome.models import processors

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")
CONFIGS = [*RECIPES, MergeConfig.recipe("best", tokens=9)]
METHODS_WITH_ATTENTION = [
    MergeConfig(method="diffrate", ratio=0.9), MergeConfig(method="visionzip", prefix=9),
    MergeConfig(method="fastv", decoder={1: 4}), MergeConfig(method="sparsevlm", decoder={0: 9}),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_a_merging_model_is_freed(config, processor, pictures):
    model = make_model()
    handle = apply(model, config, processor)
    with torch.no_grad():
        model(**batch(processor, PROMPTS, pictures))
    reference = weakref.ref(model)
    del model, handle
    gc.collect()
    assert reference() is None


def test_a_merging_tower_is_freed():
    tower = make_model().model.vision_tower
    apply(tower, MergeConfig(ratio=0.8, resize=(4, 5)))
    with torch.no_grad():
        tower(images())
    reference = weakref.ref(tower)
    del tower
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("config", [RECIPES[0], RECIPES[4]])
def test_nothing_of_a_recomputed_pass_is_kept(config, processor, pictures):
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    apply(model, config, processor)
    inputs = batch(processor, PROMPTS[:2], pictures)
    model(**inputs, labels=inputs.input_ids).loss.backward()
    remove(model)
    reference = weakref.ref(model.model.vision_tower)
    del model
    gc.collect()
    assert reference() is None


def test_a_layer_called_by_itself_is_dense(model):
    layer, plain = (
        model.model.vision_tower.encoder.layers[0],
        make_model().model.vision_tower.encoder.layers[0],
    )
    hidden = torch.randn(2, PATCHES + 1, 32)
    with merge_tokens(model, MergeConfig(ratio=0.8)), torch.no_grad():
        features(model, images())
        assert torch.equal(layer(hidden, None), plain(hidden, None))


@pytest.mark.parametrize(
    "config", [MergeConfig(ratio=0.8), MergeConfig(ratio=0.9, prefix=0.5, prefix_metric="keys")]
)
def test_threads_that_encode_images_with_one_model_get_their_own(model, config):
    pixels = [images(batch=n, seed=n) for n in (1, 2, 3)] * 8

    def encode(x):
        with torch.no_grad():
            return torch.stack(list(model.get_image_features(pixel_values=x).pooler_output))

    with merge_tokens(model, config):
        expected = [encode(x) for x in pixels[:3]] * 8
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(encode, pixels))
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


class Saved:
    """A tensor that a graph saved for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("config", [*CONFIGS[::2], *METHODS_WITH_ATTENTION])
@pytest.mark.parametrize("backward", [False, True])
def test_no_graph_outlives_the_output_of_a_pass(config, backward, processor, pictures):
    model, saved = make_model().train(), []

    def pack(tensor):
        box = Saved(tensor.detach())  # a tensor with its graph would keep the graph
        saved.append(weakref.ref(box))
        return box

    apply(model, config, processor)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        output = model(**batch(processor, PROMPTS[:2], pictures))
    if backward:
        output.logits.sum().backward()
    assert backward or any(box() is not None for box in saved)
    del output
    gc.collect()
    assert not any(box() is not None for box in saved)


class MadeTensors(TorchDispatchMode):
    """Notes every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple | list) else [found]:
            if isinstance(x, torch.Tensor):
                self.made.append(weakref.ref(x))
        return found


@pytest.mark.parametrize("config", [*CONFIGS, *METHODS_WITH_ATTENTION])
def test_nothing_as_large_as_hidden_states_is_kept(config, processor, pictures):
    """Sizes, plans and a few features are kept, but no queries, keys, or tokens of every channel."""
    model = make_model()
    with merge_tokens(model, config, processor), torch.no_grad():
        inputs = batch(processor, PROMPTS * 4, pictures)
        with MadeTensors() as tensors:
            model(**inputs)
        kept = [x for made in tensors.made if (x := made()) is not None and x.is_floating_point()]
        assert kept and sum(x.numel() for x in kept) < len(inputs["pixel_values"]) * PATCHES * 32


# Passes before the backward pass of another


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4], CONFIGS[6]])
@pytest.mark.parametrize("second", ["no grad", "generate"])
@pytest.mark.parametrize("reentrant", [None, False])
def test_other_passes_before_a_backward_pass_change_no_gradient(
    config, second, reentrant, processor, pictures
):
    def gradients(between):
        model = make_model().train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        apply(model, config, processor)
        inputs = batch(processor, PROMPTS[:2], pictures)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if between:
            with torch.set_grad_enabled(second != "no grad"):
                if second == "generate":
                    model.generate(**inputs, max_new_tokens=2)
                else:
                    model(**single(processor, PROMPTS[2], pictures[2:]))
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone, found = gradients(False), gradients(True)
    assert alone.keys() == found.keys() and all(torch.equal(alone[name], found[name]) for name in alone)


def allows_reentrant(config):
    """Whether gradient checkpointing with use_reentrant=True is not refused."""
    return config.site != "attention" or not (config.merges_in_tower or config.merging_layers)


RECOMPUTED = [(c, False) for c in CONFIGS] + [(c, True) for c in CONFIGS if allows_reentrant(c)]


@pytest.mark.parametrize("config, reentrant", RECOMPUTED)
def test_a_recomputed_merge_is_recorded_once(config, reentrant, processor, pictures):
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    handle, found = apply(model, config, processor), []
    handle.record(lambda record: found.append((record.place, record.layer)))
    inputs = batch(processor, PROMPTS[:2], pictures)
    for _ in range(2):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert len(found) == 2 * len(set(found))


# Models that share a config object


def test_two_models_with_one_config_merge_and_stop_independently():
    first, second = make_model(), make_model(seed=1)
    shared = first.model.vision_tower.config
    for module in second.model.vision_tower.modules():
        if hasattr(module, "config"):
            module.config = shared
    plain, config = features(second, images()), MergeConfig(ratio=0.8)
    with merge_tokens(second, config):
        expected = features(second, images())
    apply(first, config)
    assert torch.equal(features(second, images()), plain)
    apply(second, config)
    assert torch.equal(features(second, images()), expected)
    remove(first)
    assert torch.equal(features(second, images()), expected)
    remove(second)
    assert torch.equal(features(second, images()), plain)
    assert shared._attn_implementation == "sdpa"


# apply that fails


def fails_once(function):
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("no more room")
        return function(*args, **kwargs)

    return call


def count_hooks(model):
    return {name: [len(hooks) for hooks in kinds] for name, kinds in state(model)["hooks"].items()}


@pytest.mark.parametrize("before", [None, MergeConfig(tokens=9)])
@pytest.mark.parametrize("step", ["hooks", "processor", "config"])
def test_apply_that_fails_half_way_leaves_all_as_it_was(
    model, processor, pictures, monkeypatch, step, before
):
    if before is not None:
        apply(model, before, processor)
    inputs = single(processor, PROMPTS[0], pictures)
    with torch.no_grad():
        expected = model(**inputs).logits
    counts, was = count_hooks(model), model.config.to_dict()
    owner, name = {
        "hooks": (model.model.vision_tower.encoder.layers[3].mlp, "register_forward_hook"),
        "processor": (processors, "set_token_counts"),
        "config": (MergeConfig, "to_dict"),
    }[step]
    monkeypatch.setattr(owner, name, fails_once(getattr(owner, name)))
    with pytest.raises(OSError, match="no more room"):
        apply(model, MergeConfig(ratio=0.8), processor)
    assert applied(model) == before and model.config.to_dict() == was
    assert count_hooks(model) == counts
    again = single(processor, PROMPTS[0], pictures)
    assert torch.equal(again.input_ids, inputs.input_ids)
    with torch.no_grad():
        assert torch.equal(model(**again).logits, expected)


# What apply takes up, and what it leaves alone


def test_apply_without_a_config_takes_up_the_saved_one(model, processor, pictures, tmp_path):
    from transformers import AutoModelForImageTextToText

    config = MergeConfig(ratio=0.8)
    with merge_tokens(model, config, processor), torch.no_grad():
        model.save_pretrained(tmp_path)
        expected = model(**batch(processor, PROMPTS, pictures)).logits
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    dense = batch(processor, PROMPTS, pictures)
    with torch.no_grad():
        assert torch.equal(loaded(**dense).logits, model(**dense).logits)
    apply(loaded, processor=processor)
    assert applied(loaded) == config
    with torch.no_grad():
        assert torch.equal(loaded(**batch(processor, PROMPTS, pictures)).logits, expected)
    with pytest.raises(ValueError, match="give a config"):
        apply(make_model())


def test_a_pipeline_merges(model, processor, pictures):
    from transformers import pipeline

    processor.chat_template = "{{ messages[0].content }}"
    with merge_tokens(model, MergeConfig(ratio=0.8), processor) as handle:
        run = pipeline("image-text-to-text", model=model, processor=processor)
        found = run(images=pictures[0], text="<image> what is this", max_new_tokens=3)
        assert found[0]["generated_text"] is not None
        assert handle.sizes().shape[1] == MergeConfig(ratio=0.8).tokens_at(PATCHES, 7)


def test_graphs_of_other_models_stay_compiled(model):
    graphs = []
    linear = torch.nn.Linear(4, 4)
    other = torch.compile(linear, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    other(torch.ones(1, 4))
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        other(torch.ones(1, 4))
    other(torch.ones(1, 4))
    assert len(graphs) == 1
