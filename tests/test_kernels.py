import copy

import pytest
import torch
from conftest import LAYERS, PATCHES, make_model
from test_tower import FEATURE, features, images, slow, state
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.hooks.handle import handle_of
from llava_pitome.kernels import cpu_attention
from llava_pitome.kernels.cpu_attention import attention, is_faster
from llava_pitome.models.hf_llava import find

ABSOLUTE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


# The CPU attention kernel


def qkv(batch, count, heads, channels, dtype=torch.bfloat16):
    """Returns random queries, keys and values (B, H, T, C), and log sizes (B, T)."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, batch, count, heads, channels, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 30, (batch, count), generator=generator).float()
    return *drawn.to(dtype).transpose(2, 3), sizes.log()


def reference(query, key, value, log_sizes=None):
    """Returns softmax attention (B, T, H, C) written out, in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = scores.exp() * (1 if log_sizes is None else log_sizes.double().exp()[:, None, None])
    return ((weights / weights.sum(-1, keepdim=True)) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", ABSOLUTE)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(
    "batch, count, heads, channels",
    [(1, 1, 1, 8), (2, 7, 3, 5), (3, 36, 4, 8), (2, 55, 16, 64), (1, 130, 2, 20)],
)
def test_attention_equals_the_softmax_written_out(batch, count, heads, channels, sized, dtype):
    query, key, value, size = qkv(batch, count, heads, channels, dtype)
    size = size if sized else None
    out = attention(query, key, value, size)
    assert out.dtype == dtype
    expected = reference(query, key, value, size)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ABSOLUTE[dtype])


@pytest.mark.parametrize("scores", [1, 36 * 36, 5 * 36 * 36, 10**9])
def test_blocks_change_no_bit_of_attention(monkeypatch, scores):
    query, key, value, size = qkv(3, 36, 4, 8)
    expected = attention(query, key, value, size)
    monkeypatch.setattr(cpu_attention, "SCORES", scores)
    assert torch.equal(attention(query, key, value, size), expected)


@pytest.mark.parametrize("count", [17, 55, 300])
def test_images_of_a_batch_are_independent_in_attention(count):
    query, key, value, size = qkv(4, count, 16, 64)
    rows = zip(*(x.split(1) for x in (query, key, value, size)))
    alone = [attention(q, k, v, s) for q, k, v, s in rows]
    assert torch.equal(attention(query, key, value, size), torch.cat(alone))


@pytest.fixture
def fast_cpu(monkeypatch):
    """A CPU on which the kernel was measured to pay."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def test_the_kernel_is_for_many_bfloat16_tokens_on_cpus(fast_cpu):
    many, few = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, 16, 577, 64), (32, 4, 20, 16)))
    assert is_faster(many)
    assert not any(is_faster(x) for x in (few, many.float(), many.to("meta")))


# The kernel in the vision tower


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the tokens for which the kernel runs; it is made to pay for any."""
    shapes = []
    monkeypatch.setattr(cpu_attention, "is_faster", lambda _x: True)
    monkeypatch.setattr(cpu_attention, "attention", lambda *a: shapes.append(a[0].shape) or attention(*a))
    return shapes


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tower_with_the_kernel_equals_a_merged_tower_written_out(calls, tower, recipe):
    model, pixels, config = make_model(tower), images(), MergeConfig.recipe(recipe, ratio=0.8)
    with merge_tokens(model, config) as merging:
        found = features(model, pixels)
        lengths = merging.tower.lengths(PATCHES)
    assert calls == [(2, 4, n + (tower == "clip"), 8) for n in lengths[:FEATURE]]
    with torch.no_grad():
        torch.testing.assert_close(found, slow(model, pixels, lengths, recipe), rtol=0, atol=1e-5)


def test_the_kernel_changes_no_plan(calls, model):
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging:
        found = features(model, images())
    with merge_tokens(model, MergeConfig(ratio=0.8), kernels=False) as plain:
        torch.testing.assert_close(features(model, images()), found, rtol=0, atol=1e-5)
    assert [p.length for p in merging.plans()] == [p.length for p in plain.plans()]
    assert len(calls) == FEATURE


def test_a_tower_without_merges_runs_without_the_kernel(calls, model):
    plain = features(model, images())
    with merge_tokens(model, MergeConfig(ratio=1.0)):
        assert torch.equal(features(model, images()), plain)
    assert not calls


@pytest.mark.parametrize("why", ["kernels=False", "eager", "eager later", "gradients", "training"])
def test_the_models_own_attention_runs_where_it_must(calls, why):
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
        else:
            features(model, images())
    assert not calls


class Stop(Exception):
    pass


def test_an_interrupted_forward_pass_leaves_no_state(calls, model):
    def stop(*_):
        raise Stop

    pixels = images()
    expected, before = features(model, pixels), state(model)
    merging = apply(model, MergeConfig(ratio=0.8))
    merged = features(model, pixels)
    handle = model.model.vision_tower.encoder.layers[3].self_attn.v_proj.register_forward_hook(stop)
    with pytest.raises(Stop):
        features(model, pixels)
    handle.remove()
    assert torch.equal(features(model, pixels), merged)
    remove(model)
    assert merging.tower.last is None
    assert state(model) == before
    assert torch.equal(features(model, pixels), expected)


def test_a_copy_of_a_merging_model_merges_by_itself(calls, model):
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        copied = copy.deepcopy(model)
        expected = features(model, images())
    assert torch.equal(features(copied, images()), expected)
    assert len(calls) == 2 * FEATURE


@pytest.mark.parametrize("recipe, changes", [("paper", {}), ("paper", {"method": "tome"}), ("released", {})])
def test_a_merging_tower_reads_no_value_of_a_tensor(recipe, changes):
    """What CUDA graphs need: tensors on the meta device have no values."""
    model = make_model().to("meta")
    with merge_tokens(model, MergeConfig.recipe(recipe, ratio=0.8, **changes)) as merging, torch.no_grad():
        out = model.model.vision_tower(images().to("meta"), output_hidden_states=True)
        assert len(merging.plans()) == LAYERS - 1
    assert out.hidden_states[-2].shape[1] == 1 + merging.tower.lengths(PATCHES)[-1]


@pytest.mark.parametrize(
    "kernels, is_installed, message",
    [
        ("cuda", False, r"kernels='cuda' is unknown; allowed are True, False, 'triton'"),
        (1, False, r"kernels=1 is unknown"),
        ("triton", False, r"kernels='triton' needs triton, which is not installed"),
        ("triton", True, r"needs a vision tower on a GPU.*move the model first"),
    ],
)
def test_kernels_that_cannot_run_raise_and_leave_the_model_as_it_was(
    model, monkeypatch, kernels, is_installed, message
):
    monkeypatch.setattr("llava_pitome.api.has_triton", lambda: is_installed)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        apply(model, MergeConfig(tokens=9), kernels=kernels)
    assert state(model) == before


@pytest.mark.parametrize("kernels", [True, False])
def test_an_outer_merge_is_restored_with_its_kernels(model, kernels):
    apply(model, MergeConfig(tokens=9), kernels=kernels)
    with merge_tokens(model, MergeConfig(tokens=5), kernels=not kernels) as inner:
        assert inner.kernels is not kernels
    assert handle_of(model.model.vision_tower).kernels is kernels


@pytest.mark.parametrize("adapter_first", [True, False])
def test_lora_adapters_of_the_attention_are_used(calls, model, adapter_first):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=r".*vision_tower.*\.(q_proj|v_proj|out_proj)", init_lora_weights=False)
    config, pixels = MergeConfig(ratio=0.8), images()
    if adapter_first:
        model = get_peft_model(model, lora).eval()
    merging = apply(model, config)
    if not adapter_first:
        get_peft_model(model, lora).eval()
    found = features(find(model).model, pixels)
    assert len(calls) == FEATURE
    remove(model)
    apply(model, config, kernels=False)
    torch.testing.assert_close(features(find(model).model, pixels), found, rtol=0, atol=1e-4)
    assert merging.tower.lengths(PATCHES)[-1] == found.shape[1] - 1


def test_whether_the_kernel_runs_does_not_depend_on_the_batch(fast_cpu, monkeypatch):
    """With shapes at which it stops to pay between two layers."""
    shapes = []
    monkeypatch.setattr(
        cpu_attention, "attention", lambda *a: shapes.append(a[0].shape) or a[0].transpose(1, 2)
    )
    sizes = {"hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 16}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=40, patch_size=4)).eval().bfloat16()
    with merge_tokens(tower, MergeConfig(ratio=0.95)) as merging, torch.no_grad():
        lengths = merging.tower.lengths(100)[:-1]
        for batch in (1, 3):
            tower(images(batch, side=40).bfloat16())
            assert shapes == [(batch, 16, n + 1, 64) for n in lengths if n + 1 >= 91]
            assert 0 < len(shapes) < len(lengths)
            shapes.clear()
