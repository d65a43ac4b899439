import copy

import pytest
import torch
from conftest import PATCHES, make_model, make_processor
from prompts import IMAGE, PROMPTS, batch, generate, single

from llava_pitome import MergeConfig, apply, load, merge_tokens, remove

# Nothing to merge

NOTHING = [
    MergeConfig(ratio=1.0, decoder={}),
    MergeConfig(decoder={0: 1.0}),
    MergeConfig(decoder={0: 1.0, 1: 1.0}, prefix=1.0, site="block"),
    MergeConfig(prefix=1.0),
    MergeConfig(prefix=1.0, method="fastv"),
]
AS_MANY = [
    MergeConfig(prefix=PATCHES),
    MergeConfig(tokens=PATCHES, prefix_share=0.5),
    MergeConfig(decoder={0: PATCHES, 1: PATCHES}),
    MergeConfig(decoder={1: PATCHES}, site="block", method="fastv", llm_proportional=True),
    MergeConfig(ratio=1.0, llm_proportional=True),
    MergeConfig(ratio=1.0, prefix=PATCHES, decoder={0: PATCHES}, llm_proportional=True),
]


def hooks(part):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in part.modules()]


def parts(model):
    inner = model.model
    return *inner.language_model.children(), *inner.multi_modal_projector.children(), model.lm_head


@pytest.mark.parametrize("config", NOTHING, ids=str)
def test_nothing_to_merge_needs_no_hook_inside_the_parts_after_the_tower(config, model):
    before = [hooks(part) for part in parts(model)]
    with merge_tokens(model, config):
        assert [hooks(part) for part in parts(model)] == before


@pytest.mark.parametrize(
    "kernel, dtype", [("sdpa", torch.float32), ("eager", torch.float32), ("sdpa", torch.bfloat16)]
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("config", NOTHING + AS_MANY, ids=str)
def test_keeping_everything_changes_no_bit(config, side, dtype, kernel, pictures):
    model, processor = make_model(attn_implementation=kernel).to(dtype), make_processor()
    processor.tokenizer.padding_side = side
    inputs = batch(processor, PROMPTS, pictures).to(dtype)
    real = inputs.attention_mask.bool()
    with torch.no_grad():
        expected, said = model(**inputs).logits, generate(model, inputs)
        with merge_tokens(model, config, processor):
            assert torch.equal(batch(processor, PROMPTS, pictures).input_ids, inputs.input_ids)
            assert torch.equal(model(**inputs).logits[real], expected[real])
            if side == "left":
                assert torch.equal(generate(model, inputs), said)


# Nothing is left behind

EVERYWHERE = [
    MergeConfig(ratio=0.9, prefix=0.5, decoder={0: 0.5, 1: 2}, llm_proportional=True, resize=(5, 5)),
    MergeConfig(method="sparsevlm", decoder={0: 0.5}, site="block", metric="hidden"),
    MergeConfig(method="visionzip", prefix=7),
]


def state(model):
    """Everything of a model that merging could leave something in, and its weights."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks",
             "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip
    modules = dict(model.named_modules())
    return {
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, k)) for k in kinds] for name, module in modules.items()},
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
        "weights": {n: w.double().sum().item() for n, w in model.state_dict().items()},
    }


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize("raises", ["nowhere", "between", "language_model.layers.1.mlp",
                                    "multi_modal_projector.linear_2", "language_model.norm"])  # fmt: skip
@pytest.mark.parametrize("config", EVERYWHERE, ids=str)
def test_nothing_is_left_behind(config, raises, model, processor, pictures):
    plain = batch(processor, PROMPTS, pictures)
    with torch.no_grad():
        expected, said, before = model(**plain).logits, generate(model, plain), state(model)
    try:
        with merge_tokens(model, config, processor):
            inputs = batch(processor, PROMPTS, pictures)
            generate(model, inputs)
            if raises == "between":
                raise Stop
            if raises != "nowhere":
                handle = model.model.get_submodule(raises).register_forward_hook(stop)
                try:
                    model(**inputs)
                finally:
                    handle.remove()
    except Stop:
        assert raises != "nowhere"
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, expected)
    assert torch.equal(generate(model, plain), said)


@pytest.mark.parametrize("config", EVERYWHERE, ids=str)
def test_a_copy_merges_by_itself_and_can_be_made_plain(config, model, processor, pictures):
    plain = generate(model, batch(processor, PROMPTS, pictures))
    before = state(model)
    apply(model, config, processor)
    inputs = batch(processor, PROMPTS, pictures)
    expected = generate(model, inputs)
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied, inputs), expected)
    remove(model)
    assert state(model) == before
    assert torch.equal(generate(copied, inputs), expected)  # its hooks are its own
    remove(copied)
    assert state(copied) == before
    assert torch.equal(generate(copied, batch(processor, PROMPTS, pictures)), plain)


def test_two_models_do_not_share_what_they_remember(processor, pictures):
    config = MergeConfig(ratio=0.9, decoder={0: 0.5}, llm_proportional=True)
    one, two = make_model(), make_model(seed=1)
    other = make_processor()
    with merge_tokens(one, config, processor), merge_tokens(two, config, other), torch.no_grad():
        inputs = [single(processor, p, pictures) for p in PROMPTS[:2]]
        expected = [m(**i).logits for m, i in zip((one, two), inputs)]
        caches = [m(**i, use_cache=True).past_key_values for m, i in zip((one, two), inputs)]
        words = torch.tensor([[5, 6]])
        found = [m(input_ids=words, past_key_values=c).logits for m, c in zip((one, two), caches)]
        assert torch.equal(one(**inputs[0]).logits, expected[0])
        assert found[0].shape == found[1].shape and not torch.equal(*found)


# Saved, and at its limits


def test_a_model_that_was_saved_while_it_merged_everywhere_does_so_again(
    model, processor, pictures, tmp_path
):
    with merge_tokens(model, EVERYWHERE[0], processor):
        inputs = batch(processor, PROMPTS, pictures)
        expected = generate(model, inputs)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
    loaded, own = load(str(tmp_path))
    assert MergeConfig.from_dict(loaded.config.token_merging) == EVERYWHERE[0]
    assert torch.equal(batch(own, PROMPTS, pictures).input_ids, inputs.input_ids)
    assert torch.equal(generate(loaded, inputs), expected)


@pytest.mark.parametrize("keep", [2, 0.01])
def test_a_number_of_tokens_is_not_a_share(keep, model, processor, pictures):
    left = keep if isinstance(keep, int) else 1
    with merge_tokens(model, MergeConfig(prefix=keep), processor):
        inputs = batch(processor, PROMPTS, pictures)
        assert (inputs.input_ids == IMAGE).sum(1).tolist() == [left, 2 * left, left, 0]
        assert generate(model, inputs).shape == (4, 6)
    with merge_tokens(model, MergeConfig(decoder={0: keep}), processor), torch.no_grad():
        out = model(**single(processor, PROMPTS[0], pictures))
        assert [x.keys.shape[2] for x in out.past_key_values.layers] == [39, 3 + left, 3 + left]


def test_a_strategy_that_drops_the_first_patch_is_refused_behind_the_tower():
    model = make_model("siglip")
    model.config.vision_feature_select_strategy = "default"
    for config in (MergeConfig(prefix=0.5), MergeConfig(decoder={0: 0.5})):
        with pytest.raises(ValueError, match="'default' drops the first patch"):
            apply(model, config)
    apply(model, MergeConfig(ratio=0.9))
    remove(model)
