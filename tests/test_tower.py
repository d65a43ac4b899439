import copy
import math

import oracle
import pytest
import torch
from conftest import LAYERS, PATCHES, SIDE, make_model

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.hooks.merge_step import MergePoint, MergeStep, TokenState
from llava_pitome.merge.plan import trace

FEATURE = LAYERS - 1  # hidden_states[-2]
HEADS = 4


def images(batch=2, seed=0, side=SIDE):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def features(model, pixels):
    """What the projector is given, with the class token."""
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer]


def logits(model, pixels, tokens=PATCHES):
    ids = torch.tensor([[1] + [4] * tokens + [5, 6, 7]]).expand(len(pixels), -1)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


def average(rows, sizes, parent, weighted, order):
    """The merged rows and sizes of one image, in plain Python but for the sums."""
    kept = [i for i in order if parent[i] == i]
    members = [[j for j in range(len(parent)) if parent[j] == i] for i in kept]
    weight = sizes if weighted else [1.0] * len(sizes)
    rows = [sum(rows[j] * weight[j] for j in m) / sum(weight[j] for j in m) for m in members]
    return torch.stack(rows), [sum(sizes[j] for j in m) for m in members]


def slow(model, pixels, counts, recipe):
    """A merged tower written out, one image at a time, from the weights of the model alone."""
    tower, found = model.model.vision_tower, []
    head = 1 if hasattr(tower, "pre_layrnorm") else 0  # CLIP has a class token
    for image in pixels:
        x = tower.embeddings(image[None])
        x = (tower.pre_layrnorm(x) if head else x)[0]
        sizes = [1.0] * (len(x) - head)
        for i, layer in enumerate(tower.encoder.layers[:FEATURE]):
            h = layer.layer_norm1(x)
            q, k, v = (getattr(layer.self_attn, f"{n}_proj")(h).unflatten(-1, (HEADS, -1)) for n in "qkv")
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            if recipe == "paper":
                scores = scores + torch.tensor([1.0] * head + sizes).log()
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            x = x + layer.self_attn.out_proj(mixed)
            going = len(sizes) - counts[i + 1]
            margin = 0.9 - 0.9 * i / LAYERS
            if recipe == "paper":
                keys = k.mean(1)[head:].tolist()
                parent = oracle.pitome(keys, going, margin)
                merged, sizes = average(x[head:], sizes, parent, True, range(len(parent)))
                x = torch.cat([x[:head], merged])
                x = x + layer.mlp(layer.layer_norm2(x))
            else:
                x = x + layer.mlp(layer.layer_norm2(x))
                metric = x[head:].tolist()
                order = list(range(len(metric)))
                if i / LAYERS < 13 / 24:
                    parent = oracle.tome(metric, going)
                else:
                    parent = oracle.pitome(metric, going, margin, energy="elu")
                    down = oracle.by_energy(metric, margin, energy="elu")
                    order = down[2 * going :] + down[: 2 * going]  # protected, then merged
                merged, sizes = average(x[head:], sizes, parent, False, order)
                x = torch.cat([x[:head], merged])
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_hooks_compute_what_a_merged_tower_written_out_does(tower, recipe, kernel, warm):
    model, pixels = make_model(tower, attn_implementation=kernel), images()
    assert model.model.vision_tower.config._attn_implementation == kernel
    if warm:
        features(model, pixels)  # transformers installs hooks of its own at the first use
    config = MergeConfig.recipe(recipe, ratio=0.8)
    with merge_tokens(model, config):
        found = features(model, pixels)
    with torch.no_grad():
        expected = slow(model, pixels, config.lengths(PATCHES, FEATURE), recipe)
    assert found.shape[1] < PATCHES / 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"proportional": False},
        {"size_weighted": False},
        {"metric": "hidden"},
        {"site": "block"},
        {"method": "tome"},
        {"order": "method"},
        {"parameters": {"alpha": 0.2}},
        {"early_method": "tome", "early_depth": 0.5},
    ],
)
def test_every_field_changes_what_is_computed(model, change):
    pixels, found = images(), []
    for config in (MergeConfig(ratio=0.8), MergeConfig(ratio=0.8, **change)):
        with merge_tokens(model, config):
            found.append(features(model, pixels))
    assert found[0].shape == found[1].shape
    assert not torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_every_layer_is_given_as_many_tokens_as_the_schedule_says_and_those_behind_one(tower, recipe):
    model, seen = make_model(tower), []
    layers = model.model.vision_tower.encoder.layers
    with merge_tokens(model, MergeConfig.recipe(recipe, ratio=0.8)) as merging:
        for layer in layers:  # after the merging hooks, so that what reaches the layer is seen
            layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.append(out[0].shape[1]))
        features(model, images())
    head = 1 if tower == "clip" else 0
    assert seen == [n + head for n in merging.tower.lengths(PATCHES)[:FEATURE]] + [1]


@pytest.mark.parametrize("layer, blocks", [(-3, 6), (5, 5), (-1, 8), (8, 8)])
def test_merging_ends_at_the_feature_layer(layer, blocks):
    model = make_model(vision_feature_layer=layer)
    with merge_tokens(model, MergeConfig(tokens=9)) as merging:
        assert features(model, images()).shape[1] == 9 + 1
        assert len(merging.tower.lengths(PATCHES)) == blocks + 1


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_second_forward_pass_gives_the_same(tower, recipe):
    model, pixels = make_model(tower), images()
    with merge_tokens(model, MergeConfig.recipe(recipe, ratio=0.8)):
        first = features(model, pixels)
        features(model, images(batch=3, seed=1))
        assert torch.equal(features(model, pixels), first)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_running_one_layer_again_gives_the_same(tower):
    model = make_model(tower)
    layers, calls, outputs = model.model.vision_tower.encoder.layers, [], []
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging, torch.no_grad():
        layers[3].register_forward_pre_hook(lambda _m, a, k: calls.append((a, k)), with_kwargs=True)
        layers[3].register_forward_hook(lambda _m, _a, out: outputs.append(out))
        whole = features(model, images())
        sizes = [tokens.patch_sizes for tokens in merging.tower.last.tokens]
        for _ in range(2):
            args, kwargs = calls[0]
            assert torch.equal(layers[3](*args, **kwargs), outputs[0])
        assert all(torch.equal(t.patch_sizes, n) for t, n in zip(merging.tower.last.tokens, sizes))
        assert torch.equal(features(model, images()), whole)


def test_the_trace_says_which_patches_became_which_token(model):
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging:
        tokens = features(model, images()).shape[1] - 1
        plans = merging.plans()
        sizes = merging.tower.last.tokens[-1].patch_sizes
    slot = trace(plans)
    assert slot.shape == (2, PATCHES)
    assert [torch.bincount(row, minlength=tokens).tolist() for row in slot] == sizes.tolist()


def state(model):
    """Everything of a model that merging could leave something in, but for its weights."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks",
             "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")  # fmt: skip
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, h)) for h in hooks] for name, module in modules.items()},
        "config": model.config.to_dict(),
        "config attributes": sorted(vars(model.config)),
        "tower config": sorted(vars(model.model.vision_tower.config)),
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("raises", ["nowhere", "between", "inside a layer"])
@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_nothing_is_left_behind(tower, recipe, raises):
    model, pixels = make_model(tower), images()
    expected = logits(model, pixels)
    before, weights = state(model), copy.deepcopy(model.state_dict())

    def stop(*_):
        raise Stop

    config = MergeConfig.recipe(recipe, ratio=0.8)
    tokens = config.lengths(PATCHES, FEATURE)[-1]
    try:
        with merge_tokens(model, config):
            assert logits(model, pixels, tokens).shape[1] == tokens + 4
            if raises == "between":
                raise Stop
            if raises == "inside a layer":
                handle = model.model.vision_tower.encoder.layers[4].mlp.register_forward_hook(stop)
                try:
                    logits(model, pixels, tokens)
                finally:
                    handle.remove()
    except Stop:
        assert raises != "nowhere"
    else:
        assert raises == "nowhere"
    assert state(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model, pixels), expected)


def test_a_model_whose_first_pass_was_a_merged_one_is_as_good_as_new():
    model, pixels = make_model(), images()
    with merge_tokens(model, MergeConfig(tokens=9)):
        logits(model, pixels, 9)
    assert torch.equal(logits(model, pixels), logits(make_model(), pixels))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    "config",
    [
        MergeConfig(ratio=1.0),
        MergeConfig(tokens=PATCHES),
        MergeConfig(ratio=(1,) * FEATURE),
        MergeConfig.recipe("released", ratio=1),
    ],
)
def test_keeping_everything_changes_no_bit(config, tower, dtype, kernel, warm):
    model, pixels = make_model(tower, attn_implementation=kernel).to(dtype), images().to(dtype)
    plain = make_model(tower, attn_implementation=kernel).to(dtype)
    if warm:
        logits(model, pixels)
    with merge_tokens(model, config):
        assert torch.equal(logits(model, pixels), logits(plain, pixels))


def test_each_layer_can_have_its_own_ratio(model):
    shares = (1.0, 0.5, 1.0, 0.9, 0.4, 1.0, 0.5)
    with merge_tokens(model, MergeConfig(ratio=shares)) as merging:
        assert features(model, images()).shape[1] == 1 + 4
        assert [slot.patch_sizes.shape[1] for slot in merging.tower.last.tokens] == [
            36,
            36,
            18,
            18,
            17,
            7,
            7,
            4,
        ]
        assert all(slot.patch_sizes.sum(1).tolist() == [PATCHES] * 2 for slot in merging.tower.last.tokens)
        assert len(merging.plans()) == 4


@pytest.mark.parametrize("ratio", [0.3, (1.0, 0.05, *[1.0] * 5), 0.01])
@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_more_than_half_can_go_in_one_layer(tower, recipe, ratio):
    model = make_model(tower)
    with merge_tokens(model, MergeConfig.recipe(recipe, ratio=ratio)) as merging:
        found = features(model, images())
    assert found.shape[1] == merging.tower.lengths(PATCHES)[-1] + (tower == "clip") <= 3
    assert found.isfinite().all()


@pytest.mark.parametrize("tokens", range(1, PATCHES + 1, 5))
@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_as_many_tokens_arrive_as_were_asked_for(model, recipe, tokens):
    with merge_tokens(model, MergeConfig.recipe(recipe, tokens=tokens)):
        assert features(model, images()).shape[1] == 1 + tokens


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_tower_alone_merges_up_to_its_last_layer(tower):
    alone = make_model(tower).model.vision_tower
    with merge_tokens(alone, MergeConfig(tokens=5)), torch.no_grad():
        assert alone(images()).last_hidden_state.shape[1] == 5 + (tower == "clip")
    assert alone(images()).last_hidden_state.shape[1] == PATCHES + (tower == "clip")


def test_an_image_of_another_size_keeps_its_own_share(model):
    tower = model.model.vision_tower
    with merge_tokens(model, MergeConfig(ratio=0.9)) as merging, torch.no_grad():
        for side in (SIDE, 64, SIDE):
            count = (side // 8) ** 2
            out = tower(images(side=side), output_hidden_states=True, interpolate_pos_encoding=True)
            assert out.hidden_states[-2].shape[1] == 1 + merging.tower.lengths(count)[-1]


def test_images_of_a_batch_do_not_know_of_each_other(model):
    pixels = images(4)
    with merge_tokens(model, MergeConfig(ratio=0.8)):
        together, alone = features(model, pixels), torch.cat([features(model, p[None]) for p in pixels])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_class_token_never_merges(model):
    with merge_tokens(model, MergeConfig(ratio=0.5)) as merging:
        found = features(model, images())
    with torch.no_grad():
        expected = slow(model, images(), merging.tower.lengths(PATCHES), "paper")
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    assert merging.tower.lengths(PATCHES)[-1] == found.shape[1] - 1


def test_gradients_reach_every_layer_up_to_the_feature_layer(model):
    model.train()
    with merge_tokens(model, MergeConfig(ratio=0.8)) as merging:
        tokens = merging.tower.lengths(PATCHES)[-1]
        ids = torch.tensor([[1] + [4] * tokens + [5, 6, 7]])
        model(input_ids=ids, pixel_values=images(1), labels=ids).loss.backward()
    layers = model.model.vision_tower.encoder.layers
    for layer in layers[:FEATURE]:
        grads = [
            p.grad for n, p in layer.named_parameters() if "k_proj.bias" not in n
        ]  # softmax ignores that one
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None or not p.grad.any() for p in layers[FEATURE].parameters())


def test_what_is_applied_last_holds(model):
    apply(model, MergeConfig(tokens=9))
    apply(model, MergeConfig(tokens=20))
    assert features(model, images()).shape[1] == 1 + 20
    remove(model)
    assert features(model, images()).shape[1] == 1 + PATCHES


def test_autocast_merges(model):
    with merge_tokens(model, MergeConfig(tokens=9)), torch.autocast("cpu", dtype=torch.bfloat16):
        found = features(model, images())
    assert found.shape[1] == 10
    assert found.isfinite().all()


def test_matching_does_not_lose_precision_under_autocast():
    torch.manual_seed(0)
    metric, ones, found = torch.randn(2, 36, 8), TokenState(torch.ones(2, 36)), []
    merger = MergeStep(MergeConfig(ratio=0.5, metric="hidden"), 0, False)
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            found.append(
                merger.merge(metric, metric, 18, ones, MergePoint("tower", 0, 0.0, "pitome", {}), {})[
                    1
                ].plan.slot
            )
    assert torch.equal(*found)
