import copy

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model
from test_tower import FEATURE, features, images, slow, state
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.hooks import vision_tower as place
from llava_pitome.hooks.handle import installed
from llava_pitome.kernels import cpu_attention as kernel
from llava_pitome.kernels.cpu_attention import attention, pays
from llava_pitome.models.hf_llava import find

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def qkv(batch, count, heads, channels, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, batch, count, heads * channels, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 30, (batch, count), generator=generator).float()
    return *drawn.to(dtype), size


def reference(query, key, value, heads, size=None):
    """The softmax written out, in float64."""
    query, key, value = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.exp() * (1 if size is None else size.double()[:, None, None])
    return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(
    "batch, count, heads, channels",
    [(1, 1, 1, 8), (2, 7, 3, 5), (3, 36, 4, 8), (2, 55, 16, 64), (1, 130, 2, 20)],
)
def test_the_attention_kernel_computes_the_softmax_written_out(batch, count, heads, channels, sized, dtype):
    query, key, value, size = qkv(batch, count, heads, channels, dtype)
    size = size if sized else None
    found = attention(query, key, value, heads, size)
    assert found.dtype == dtype
    expected = reference(query, key, value, heads, size)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("scores", [1, 36 * 36, 5 * 36 * 36, 10**9])
def test_the_blocks_of_the_attention_kernel_change_nothing(monkeypatch, scores):
    given = qkv(3, 36, 4, 8, torch.bfloat16)
    whole = attention(*given[:3], 4, given[3])
    monkeypatch.setattr(kernel, "SCORES", scores)
    assert torch.equal(attention(*given[:3], 4, given[3]), whole)


@pytest.mark.parametrize("count", [17, 55, 300])
def test_images_of_a_batch_do_not_know_of_each_other_in_the_attention_kernel(count):
    given = qkv(4, count, 16, 64, torch.bfloat16)
    alone = [attention(*(x[i : i + 1] for x in given[:3]), 16, given[3][i : i + 1]) for i in range(4)]
    assert torch.equal(attention(*given[:3], 16, given[3]), torch.cat(alone))


def test_the_attention_kernel_is_for_many_bfloat16_tokens_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    many, few = torch.zeros(1, 577, 1024, dtype=torch.bfloat16), torch.zeros(32, 20, 64, dtype=torch.bfloat16)
    assert pays(many)
    assert not pays(few)
    assert not pays(many.float())
    assert not pays(many.to("meta"))


@pytest.fixture
def counted(monkeypatch):
    """Lets the kernel pay for any tokens, and counts how often it runs."""
    calls = []

    def spy(*args):
        calls.append(args[0].shape)
        return attention(*args)

    monkeypatch.setattr(place, "pays", lambda _x: True)
    monkeypatch.setattr("llava_pitome.hooks.own_attention.attention", spy)
    return calls


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tower_with_the_kernel_computes_what_a_merged_tower_written_out_does(counted, tower, recipe):
    model, pixels, config = make_model(tower), images(), MergeConfig.recipe(recipe, ratio=0.8)
    with merge_tokens(model, config) as merging:
        found = features(model, pixels)
        lengths = merging.tower.lengths(PATCHES)
    head = tower == "clip"
    assert counted == [(2, n + head, 32) for n in lengths[:FEATURE]]
    with torch.no_grad():
        expected = slow(model, pixels, lengths, recipe)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_keys_are_seen_whole_whatever_the_block_is_handed(counted, model):
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging:
        found = features(model, images())
    with merge_tokens(model, MergeConfig(ratio=0.8), kernels=False) as plain:
        torch.testing.assert_close(features(model, images()), found, rtol=0, atol=1e-5)
    assert [p.length for p in merging.plans()] == [p.length for p in plain.plans()]
    assert len(counted) == FEATURE


def test_where_nothing_merges_the_block_attends_itself(counted, model):
    plain = features(model, images())
    with merge_tokens(model, MergeConfig(ratio=1.0)):
        assert torch.equal(features(model, images()), plain)
    assert not counted


@pytest.mark.parametrize("why", ["kernels=False", "eager", "eager later", "gradients", "a mask", "training"])
def test_the_block_attends_itself_where_it_has_to(counted, why):
    model = make_model(attn_implementation="eager" if why == "eager" else "sdpa")
    tower = model.model.vision_tower
    with merge_tokens(model, MergeConfig(ratio=0.8), kernels=why != "kernels=False"):
        if why == "eager later":
            model.set_attn_implementation("eager")
            with torch.no_grad():
                maps = tower(images(), output_attentions=True).attentions
            assert maps[0].shape[-2:] == (37, 37)
        elif why == "training":
            features(model.train(), images())
        elif why == "gradients":
            tower(images())
        elif why == "a mask":
            with torch.no_grad():
                hidden = torch.randn(2, 37, 32)
                for layer in tower.encoder.layers[:2]:
                    hidden = layer(hidden, torch.zeros(2, 1, 1, hidden.shape[1]))
        else:
            features(model, images())
    assert not counted


class Stop(Exception):
    pass


def test_the_kernel_leaves_nothing_behind_when_a_pass_is_broken_off(counted, model):
    def stop(*_):
        raise Stop

    pixels = images()
    expected, before = features(model, pixels), state(model)
    merging = apply(model, MergeConfig(ratio=0.8))
    whole = features(model, pixels)
    handle = model.model.vision_tower.encoder.layers[3].self_attn.v_proj.register_forward_hook(stop)
    with pytest.raises(Stop):
        features(model, pixels)
    handle.remove()
    assert torch.equal(features(model, pixels), whole)
    remove(model)
    assert all(own._hidden is None and own._projected == [None] * 3 for own in merging.tower._own)
    assert state(model) == before
    assert torch.equal(features(model, pixels), expected)


def test_a_copy_of_a_merging_model_attends_by_itself(counted, model):
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        copied = copy.deepcopy(model)
        expected = features(model, images())
    assert torch.equal(features(copied, images()), expected)
    assert len(counted) == 2 * FEATURE


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("method", ["pitome", "tome"])
def test_a_merging_tower_never_asks_the_device_for_a_value(recipe, method):
    """What CUDA graphs need: the meta device has no values, and refuses to be asked."""
    model = make_model().to("meta")
    config = (
        MergeConfig(ratio=0.8, method=method) if recipe == "paper" else MergeConfig.recipe(recipe, ratio=0.8)
    )
    with merge_tokens(model, config) as merging, torch.no_grad():
        out = model.model.vision_tower(images().to("meta"), output_hidden_states=True)
        assert len(merging.plans()) == LAYERS - 1
    assert out.hidden_states[-2].shape[1] == 1 + merging.tower.lengths(PATCHES)[-1]


@pytest.mark.parametrize(
    "kernels, message",
    [
        ("cuda", r"kernels='cuda' is unknown; allowed are True, False, 'triton'"),
        (1, r"kernels=1 is unknown"),
        ("triton", r"kernels='triton' needs triton, which is not installed"),
    ],
)
def test_kernels_that_cannot_run_raise_before_anything_is_touched(model, monkeypatch, kernels, message):
    monkeypatch.setattr("llava_pitome.api.has_triton", lambda: False)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply(model, MergeConfig(tokens=9), kernels=kernels)
    assert state(model) == before


def test_triton_on_a_model_that_is_not_on_a_gpu_raises(model, monkeypatch):
    monkeypatch.setattr("llava_pitome.api.has_triton", lambda: True)
    with pytest.raises(ValueError, match=r"needs a vision tower on a GPU.*move the model first"):
        apply(model, MergeConfig(tokens=9), kernels="triton")


@pytest.mark.parametrize("kernels", [True, False])
def test_what_was_applied_before_comes_back_with_its_kernels(model, kernels):
    apply(model, MergeConfig(tokens=9), kernels=kernels)
    with merge_tokens(model, MergeConfig(tokens=5), kernels=not kernels) as inner:
        assert inner.kernels is not kernels
    assert [place.kernels for place in installed(model)] == [kernels]


@pytest.mark.parametrize("first", [True, False])
def test_what_peft_puts_into_the_attention_is_not_passed_over(counted, model, first):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=r".*vision_tower.*\.(q_proj|v_proj|out_proj)", init_lora_weights=False)
    config, pixels = MergeConfig(ratio=0.8), images()
    if first:
        model = get_peft_model(model, lora).eval()
    merging = apply(model, config)
    if not first:
        get_peft_model(model, lora).eval()
    found = features(find(model).model, pixels)
    assert len(counted) == first * FEATURE
    remove(model)
    apply(model, config, kernels=False)
    torch.testing.assert_close(features(find(model).model, pixels), found, rtol=0, atol=1e-4)
    assert merging.tower.lengths(PATCHES)[-1] == found.shape[1] - 1


def test_whether_the_kernel_pays_does_not_depend_on_the_batch(monkeypatch):
    """With shapes at which it stops to pay on the way through the layers."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    taken = []
    monkeypatch.setattr(
        "llava_pitome.hooks.own_attention.attention", lambda *a: taken.append(a[0].shape) or a[0]
    )
    shapes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 16}
    tower = CLIPVisionModel(CLIPVisionConfig(**shapes, image_size=40, patch_size=4)).eval().bfloat16()
    with merge_tokens(tower, MergeConfig(ratio=0.95)) as merging, torch.no_grad():
        lengths = merging.tower.lengths(100)[:-1]
        for batch in (1, 3, 8):
            tower(images(batch, side=40).bfloat16())
            assert taken == [(batch, n + 1, 1024) for n in lengths if n + 1 >= 91]
            assert 0 < len(taken) < len(lengths)
            taken.clear()


def test_keys_that_are_missing_raise(model):
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        attention = model.model.vision_tower.encoder.layers[0].self_attn
        attention.k_proj = copy.deepcopy(attention.k_proj)
        attention.k_proj._forward_hooks.clear()
        with pytest.raises(RuntimeError, match="made no keys"):
            features(model, images())
