"""Copies of a merging model and of its parts, and modules that are replaced while it merges."""

import copy
import pickle

import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from peft import LoraConfig, get_peft_model
from prompts import PROMPTS, RECIPES, batch, single
from test_tower import images, state

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied, image_tokens
from llava_pitome.hooks.hook_owner import remove_hooks

BEST = MergeConfig.recipe("best", tokens=6)
CONFIGS = [
    *RECIPES, BEST, MergeConfig(decoder={0: 0.5}), MergeConfig(method="diffrate", ratio=0.8),
    MergeConfig(method="visionzip", prefix=9), MergeConfig(method="fastv", decoder={1: 4}),
]  # fmt: skip


def logits(model, processor, pictures):
    with torch.no_grad():
        return model(**single(processor, PROMPTS[1], pictures)).logits


# Copies of the whole model


def average(model):
    return torch.optim.swa_utils.AveragedModel(model)


COPIES = {
    "deepcopy": copy.deepcopy,
    "average": lambda model: average(model).module,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("config", CONFIGS[::2])
def test_a_copy_merges_as_the_model_and_stops_alone(config, made, processor, pictures):
    model, plain = make_model(), make_model()
    dense = logits(plain, processor, pictures)
    logits(model, processor, pictures)  # transformers installs hooks in the first pass
    before = state(model)
    apply(model, config, processor)
    expected = logits(model, processor, pictures)
    other = COPIES[made](model)
    assert applied(other) == config
    assert image_tokens(other) == image_tokens(model) == config.tokens_at(PATCHES, 7)
    assert torch.equal(logits(other, processor, pictures), expected)
    with merge_tokens(other, MergeConfig(ratio=0.95)):
        assert applied(other).ratio == 0.95 and applied(model) == config
        assert torch.equal(logits(model, processor, pictures), expected)
    assert applied(other) == config
    assert torch.equal(logits(other, processor, pictures), expected)
    remove(other)
    assert applied(other) is None and applied(model) == config
    assert torch.equal(logits(other, make_processor(), pictures), dense)
    assert torch.equal(logits(model, processor, pictures), expected)  # and its processor
    remove(model)
    assert state(model) == before
    assert state(other) == before
    assert torch.equal(logits(model, processor, pictures), dense)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_pickled_model_merges_as_the_model_and_stops_alone(config, processor, pictures):
    model = make_model()
    apply(model, config, processor)
    other, own = pickle.loads(pickle.dumps((model, processor)))
    assert applied(other) == config
    assert torch.equal(logits(other, own, pictures), logits(model, processor, pictures))
    remove(other)
    assert applied(other) is None and applied(model) == config
    assert torch.equal(
        logits(other, make_processor(), pictures), logits(make_model(), make_processor(), pictures)
    )


@pytest.mark.parametrize("config", CONFIGS)
def test_a_copy_outlives_the_model(config, processor, pictures):
    model = make_model()
    apply(model, config, processor)
    expected = logits(model, processor, pictures)
    other, own = copy.deepcopy((model, processor))
    del model, processor
    assert torch.equal(logits(other, own, pictures), expected)
    remove(other)
    assert applied(other) is None


@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_can_be_copied_after_it_was_trained(config, processor, pictures):
    model = make_model()
    apply(model, config, processor)
    inputs = single(processor, PROMPTS[0], pictures)
    model(**inputs, labels=inputs.input_ids).loss.backward()
    expected = logits(model, processor, pictures)
    assert torch.equal(logits(copy.deepcopy(model), processor, pictures), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_copied_tower_merges_alone(config):
    if not config.merges_in_tower:
        config = MergeConfig(ratio=0.9)
    model = make_model()
    apply(model, config)
    tower = copy.deepcopy(model.model.vision_tower)
    with torch.no_grad():
        expected = model.model.vision_tower(images(), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(tower(images(), output_hidden_states=True).hidden_states[-2], expected)


# Modules that contain merging models


def in_dict(model):
    return torch.nn.ModuleDict({"llava": model})


def in_list_twice(model):
    return torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Sequential(model), make_model(seed=3)])


@pytest.mark.parametrize("around", [in_dict, in_list_twice, average, torch.nn.DataParallel])
@pytest.mark.parametrize("config", [CONFIGS[0], BEST, CONFIGS[7]])
def test_remove_finds_models_inside_of_others(config, around, model, processor, pictures):
    dense, before = logits(model, processor, pictures), state(model)
    apply(model, config, processor)
    whole = around(model)
    remove(whole)
    if around is average:
        assert applied(whole.module) is None and applied(model) == config
        remove(model)
    assert applied(model) is None
    assert state(model) == before
    assert torch.equal(logits(model, processor, pictures), dense)


def clip():
    from transformers import CLIPConfig, CLIPModel

    vision = make_model().config.vision_config.to_dict()
    return CLIPModel(CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1})).eval()


@pytest.mark.parametrize(
    "make, part", [(make_model, "model"), (make_model, "model.vision_tower"), (clip, "vision_model")]
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_part_of_a_merging_model_does_not_stop_or_merge_alone(make, part, copied):
    model = make()
    apply(model, MergeConfig(ratio=0.8))
    if copied:
        model = copy.deepcopy(model)
    inner = model.get_submodule(part)

    def encode():
        with torch.no_grad():
            return model.get_image_features(pixel_values=images()).last_hidden_state

    expected = encode()
    if copied and part != "model.vision_tower":
        remove(model)
        return
    for call in (lambda: remove(inner), lambda: apply(inner, MergeConfig(ratio=0.9))):
        with pytest.raises(ValueError, match="remove that first"):
            call()
    assert torch.equal(encode(), expected) and applied(inner) == MergeConfig(ratio=0.8)
    remove(model)
    assert applied(model) is applied(inner) is None
    apply(inner, MergeConfig(ratio=0.8))
    with pytest.raises(ValueError, match="remove that first"):
        apply(model, MergeConfig(ratio=0.9))
    remove(model)  # which contains the part
    assert applied(inner) is None


# Copies of parts, as peft makes them


PARTS = [
    "multi_modal_projector", "vision_tower", "layer_norm2", "fc2", "encoder.layers.6",
    "vision_tower.encoder.layers.2.mlp", "vision_tower.encoder.layers.3.self_attn",
    "language_model.layers.0.mlp", "language_model.layers.1", "post_attention_layernorm", "lm_head",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("config", [BEST, CONFIGS[-1]])
def test_modules_to_save_merge_as_they_do_where_peft_came_first(config, part, pictures):
    lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=[part])
    found, processor = [], make_processor()
    for order in ("never", "before", "after"):
        model = make_model()
        if order == "before":
            model = get_peft_model(model, lora).eval()
        apply(model, config, processor)
        if order == "after" and config.method == "fastv" and part != "language_model.layers.1":
            with pytest.raises(RuntimeError, match="wrapped after apply"):
                logits(get_peft_model(model, lora).eval(), processor, pictures)
            return
        if order == "after":
            model = get_peft_model(model, lora).eval()
        found.append(logits(model, processor, pictures))
        remove(model)
        assert torch.equal(logits(model, processor, pictures), logits(make_model(), processor, pictures))
        assert not any(
            "token_merging" in repr(hook) or "llava_pitome" in repr(hook)
            for module in model.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# Modules that are replaced: by copies they are served, by new ones they are refused


def replace(root, path, made):
    parent, _, name = path.rpartition(".")
    parent = root.get_submodule(parent)
    setattr(parent, name, made(getattr(parent, name)))


def fresh(module):
    """A module like another without its hooks and attributes."""
    new = copy.deepcopy(module)
    remove_hooks(new)
    for part in new.modules():
        for name in [name for name in vars(part) if name.startswith("token_merging")]:
            delattr(part, name)
    return new


TOWER = "model.vision_tower.encoder.layers.2"
LAYER = "model.language_model.layers.0"
REPLACED = {
    "tower layer": (TOWER, MergeConfig(ratio=0.8)),
    "tower feature layer": ("model.vision_tower.encoder.layers.6", MergeConfig(ratio=0.8)),
    "tower feature layer, prefix": ("model.vision_tower.encoder.layers.6", MergeConfig(prefix=9)),
    "tower attention": (TOWER + ".self_attn", MergeConfig(ratio=0.8)),
    "tower norm": (TOWER + ".layer_norm2", MergeConfig(ratio=0.8)),
    "tower mlp": (TOWER + ".mlp", MergeConfig(ratio=0.8)),
    "projector": ("model.multi_modal_projector", MergeConfig(prefix=9)),
    "projector, positions": ("model.multi_modal_projector", MergeConfig(ratio=0.8, positions="original")),
    "llm layer": (LAYER, MergeConfig(decoder={0: 0.5})),
    "llm layer before": (LAYER, MergeConfig(decoder={1: 0.5}, llm_proportional=True, ratio=0.9)),
    "llm layer after": ("model.language_model.layers.2", MergeConfig(decoder={0: 0.5})),
    "llm norm": (LAYER + ".post_attention_layernorm", MergeConfig(decoder={0: 0.5})),
    "llm mlp": (LAYER + ".mlp", MergeConfig(decoder={0: 0.5})),
    "llm attention": (LAYER + ".self_attn", MergeConfig(decoder={0: 0.5})),
    "llm key projection": (LAYER + ".self_attn.k_proj", MergeConfig(decoder={0: 0.5})),
    "llm last norm": ("model.language_model.norm", MergeConfig(decoder={0: 0.5})),
    "rotary": ("model.language_model.rotary_emb", MergeConfig(ratio=0.8, positions="original")),
}


REFUSED = "replaced after apply|do not match|encoded last"


@pytest.mark.parametrize("case", REPLACED)
def test_a_new_module_in_place_of_one_with_hooks_raises(case, model, processor, pictures):
    path, config = REPLACED[case]
    dense = logits(model, processor, pictures)
    apply(model, config, processor)
    expected = logits(model, processor, pictures)
    replace(model, path, copy.deepcopy)
    assert torch.equal(logits(model, processor, pictures), expected)
    replace(model, path, fresh)
    message = "size of tensor" if "mlp" in case or case == "llm layer after" else REFUSED
    with pytest.raises((RuntimeError, ValueError), match=message):
        logits(model, processor, pictures[2:])
    remove(model)
    assert torch.equal(logits(model, processor, pictures), dense)
    apply(model, config, processor)
    assert torch.equal(logits(model, processor, pictures), expected)


class Quantized(torch.nn.Module):
    """A linear layer whose weights are bytes, in place of one in full precision."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = (linear.weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("config", CONFIGS)
def test_linear_layers_that_are_quantized_later_are_served_or_refused(config, processor, pictures):
    def quantize(model):
        for path in [
            n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_" not in n
        ]:
            replace(model, path, Quantized)
        return model.requires_grad_(False)

    model, first = make_model(), quantize(make_model())
    apply(model, config, processor)
    quantize(model)
    if config.merging_layers:
        with pytest.raises(RuntimeError, match="replaced after apply"):
            logits(model, processor, pictures)
        return
    found = logits(model, processor, pictures)
    apply(first, config, processor)
    assert torch.equal(found, logits(first, processor, pictures))


def test_a_batch_after_an_exponential_average_is_that_of_its_weights(model, processor, pictures):
    apply(model, BEST, processor)
    mean = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = batch(processor, PROMPTS[:2], pictures)
    for _ in range(2):
        model(**inputs, labels=inputs.input_ids).loss.backward()
        optimizer.step()
        mean.update_parameters(model)
    plain = make_model()
    plain.load_state_dict(mean.module.state_dict())
    apply(plain, BEST)
    assert torch.equal(
        logits(mean.module.eval(), processor, pictures), logits(plain.eval(), processor, pictures)
    )


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "layer_norm2", "lm_head"])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], BEST])
def test_a_model_whose_adapter_is_disabled_merges_as_the_plain_one(config, part, processor, pictures):
    lora = LoraConfig(r=2, target_modules=r".*language_model.*o_proj", modules_to_save=[part])
    plain, model = make_model(), get_peft_model(make_model(), lora).eval()
    apply(plain, config, processor)
    apply(model, config, processor)
    expected = logits(plain, processor, pictures)
    with model.disable_adapter():
        assert torch.equal(logits(model, processor, pictures), expected)
    assert torch.equal(logits(model, processor, pictures), expected)
    remove(model)
    with model.disable_adapter():
        assert torch.equal(
            logits(model, make_processor(), pictures), logits(make_model(), make_processor(), pictures)
        )


def checkpointed(layer):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


def logits_of_wrapped_layers(model, config, first, wrap, processor, pictures):
    """What a model computes that merges before or after each layer is wrapped, and then without merging."""
    if not first:
        apply(model, config, processor)
    for layers in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for i in range(len(layers)):
            layers[i] = wrap(layers[i])
    if first:
        apply(model, config, processor)
    found = logits(model, processor, pictures)
    remove(model)
    return found, logits(model, processor, pictures)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3], BEST, CONFIGS[7]])
def test_layers_may_be_wrapped(config, first, processor, pictures):
    plain = make_model()
    dense = logits(plain, processor, pictures)
    with merge_tokens(plain, config, processor):
        expected = logits(plain, processor, pictures)
    found = logits_of_wrapped_layers(make_model(), config, first, checkpointed, processor, pictures)
    assert torch.equal(found[0], expected) and torch.equal(found[1], dense)


@pytest.mark.parametrize("part", ["vision_tower", "language_model"])
@pytest.mark.parametrize("config", [BEST, MergeConfig(ratio=0.9, prefix=9), MergeConfig(decoder={0: 0.5})])
def test_a_whole_stage_that_is_replaced_raises_and_is_given_back(config, part, processor, pictures):
    model = make_model()
    before = sorted(vars(model)), model.config.to_dict()
    apply(model, config, processor)
    setattr(model.model, part, make_model(seed=1).model.get_submodule(part))
    changes = config.merges_in_tower if part == "vision_tower" else config.reaches_llm
    if changes:
        with pytest.raises(RuntimeError, match="replaced after apply"):
            logits(model, processor, pictures)
    assert applied(model) == config
    remove(model)
    assert applied(model) is None
    assert (sorted(vars(model)), model.config.to_dict()) == before
    assert logits(model, processor, pictures).isfinite().all()


def test_a_copys_passes_and_end_are_not_those_of_the_model(processor, pictures):
    model = make_model()
    handle = apply(model, BEST, processor)
    other = copy.deepcopy(model)
    logits(model, processor, pictures)
    plans = handle.plans()
    remove(other)
    assert all(torch.equal(x.slot, y.slot) for x, y in zip(handle.plans(), plans, strict=True))


def test_an_average_says_how_it_merges(processor):
    model = make_model()
    apply(model, BEST, processor)
    mean = torch.optim.swa_utils.AveragedModel(model)
    assert applied(mean) == BEST
    remove(mean)
    assert applied(mean) is None and applied(model) == BEST
