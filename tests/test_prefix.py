import math

import oracle
import pytest
import torch
from conftest import LAYERS, PATCHES, make_model, make_processor
from precise import alone, padded, precise, run
from prompts import IMAGE, PROMPTS, batch, generate, single

from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.kernels import cpu_attention
from llava_pitome.kernels.cpu_attention import attention as kernel
from llava_pitome.merge.plan import trace
from llava_pitome.merge.reduce import MergeResult
from llava_pitome.methods import Method, tome
from llava_pitome.methods.registry import choose

FEATURE, HEADS = LAYERS - 1, 4
FITTING = [m for m in METHODS if "prefix" in METHODS[m].places]


def made(model, pixels):
    """What reaches the language model: (I, n, D)."""
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixels).pooler_output))


@torch.no_grad()
def plain(model, pixels, lengths=None, bias=True):
    """A tower written out that merges as the paper does: its features, and of its last block's survivors
    keys, attention and sizes."""
    tower, lengths = model.model.vision_tower, lengths or (PATCHES,) * (FEATURE + 1)
    head = int(hasattr(tower, "pre_layrnorm"))
    found = []
    for image in pixels:
        x = tower.embeddings(image[None])
        x = (tower.pre_layrnorm(x) if head else x)[0]
        sizes = torch.ones(PATCHES)
        for i, layer in enumerate(tower.encoder.layers[:FEATURE]):
            h = layer.layer_norm1(x)
            q, k, v = (getattr(layer.self_attn, f"{n}_proj")(h).unflatten(-1, (HEADS, -1)) for n in "qkv")
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            if bias:
                scores = scores + torch.cat([torch.ones(head), sizes]).log().to(x)
            attention = scores.softmax(-1)
            x = x + layer.self_attn.out_proj(torch.einsum("hqk,khd->qhd", attention, v).flatten(1))
            parent = list(range(len(sizes)))
            if lengths[i + 1] < lengths[i]:
                parent = oracle.pitome(k.mean(1)[head:].tolist(), lengths[i] - lengths[i + 1],
                                       0.9 - 0.9 * i / LAYERS)  # fmt: skip
            members = [[j for j in range(len(parent)) if parent[j] == p] for p in range(len(parent))]
            members = [m for m in members if m]
            rows = [(x[head:][m] * sizes[m, None]).sum(0) / sizes[m].sum() for m in members]
            x = torch.cat([x[:head], torch.stack(rows)])
            x = x + layer.mlp(layer.layer_norm2(x))
            sizes = torch.stack([sizes[m].sum() for m in members])
        keys = k.mean(1)
        keys = torch.stack([*keys[:head], *(keys[head:][m].mean(0) for m in members)])
        maps = attention.mean(0)
        seen = maps[0, 1:] if head else maps.mean(0)
        seen = torch.stack([seen[m].sum() for m in members])
        found.append((x, keys, seen, sizes))
    return [torch.stack(part) for part in zip(*found)]


def expected(model, pixels, config, front=0):
    """The prefix's tokens (I, m, D) and sizes by the public function and plain averages."""
    lengths = config.lengths(PATCHES, FEATURE) if config.merges_in_tower else None
    x, keys, seen, sizes = plain(model, pixels, lengths, config.proportional)
    head = x.shape[1] - sizes.shape[1]
    with torch.no_grad():
        projected = model.model.multi_modal_projector(x[:, head - front :])
    front_tokens, projected, keys = projected[:, :front], projected[:, front:], keys[:, head:]
    count = projected.shape[1]
    by_keys = (config.prefix_metric or METHODS[config.method].prefix_metric) == "keys"
    metric = keys if by_keys else projected
    given = {"class_attention": seen, "grid": (6, 6)}
    given = {name: given[name] for name in METHODS[config.method].needs}
    options = {"depth": 1.0, **given, **config.parameters}
    remove = count - config.prefix_length(count, PATCHES, FEATURE)
    result = choose(metric, remove, config.method, **options)
    parent, weight, mixing = result.parent, result.weight, result.mixing
    if result.prunes:
        weight = (parent == torch.arange(count)).double()
    if weight is None:
        weight = torch.ones(sizes.shape, dtype=torch.float64)
    if mixing is not None:
        mixing = mixing.expand(len(pixels), -1, -1).double()
    rows, totals = [], []
    for i in range(len(pixels)):
        members = [(parent[i] == k).nonzero().flatten() for k in range(count) if parent[i, k] == k]
        counted = sizes[i].double() * weight[i]
        totals.append(torch.stack([counted[m].sum() for m in members]).float())
        average = [(projected[i, m] * counted[m, None]).sum(0) / counted[m].sum() for m in members]
        if result.keeps_norm:
            average = [a * projected[i, m].norm(dim=-1).max() / a.norm() if len(m) > 1 else a
                       for a, m in zip(average, members)]  # fmt: skip
        rows.append(torch.stack(average) if mixing is None else mixing[i] @ projected[i])
    return torch.cat([front_tokens, torch.stack(rows)], 1), torch.stack(totals)


CONFIGS = [
    *(MergeConfig(method=m, prefix=0.5) for m in FITTING),
    *(MergeConfig(method=m, prefix=19, prefix_metric="keys") for m in FITTING if not METHODS[m].needs_grid),
    *(
        MergeConfig(method=m, prefix=0.7, prefix_metric="features")
        for m in FITTING
        if METHODS[m].prefix_metric == "keys"
    ),
    MergeConfig(method="dct", prefix=2),
    MergeConfig(prefix=0.2),
    MergeConfig(prefix=0.5, parameters={"margin": 0.3}),
    MergeConfig(prefix=0.5, ratio=0.9),
    MergeConfig(prefix=0.6, ratio=0.9, prefix_metric="keys"),
    MergeConfig(prefix=0.5, ratio=(1.0, 0.5, *[1.0] * 5), prefix_metric="keys"),
    MergeConfig(tokens=7, prefix_share=0.5),
    MergeConfig(tokens=7, prefix_share=1.0),
    MergeConfig(prefix=0.5, method="diffrate", ratio=0.9, early_method="pitome", early_depth=1.0),
    MergeConfig(
        prefix=0.5, method="tofu", ratio=0.9, early_method="pitome", early_depth=1.0, proportional=False
    ),
]


def name(config):
    return " ".join(
        f"{k}={v}" for k, v in config.to_dict().items() if v != MergeConfig(ratio=1.0).to_dict()[k]
    )


@pytest.mark.parametrize("tower, front", [("clip", 0), ("clip", 1), ("siglip", 0)])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_the_hooks_compute_what_a_prefix_written_out_does(config, tower, front, pictures):
    model, processor = precise(make_model(tower)), make_processor(tower)
    if front:
        model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    pixels = padded(processor, PROMPTS, pictures)["pixel_values"]
    rows, sizes = expected(model, pixels, config, front)
    with merge_tokens(model, config, processor) as merging:
        found = made(model, pixels)
        assert found.shape[1] == config.tokens_at(PATCHES, FEATURE) + front
        torch.testing.assert_close(merging.sizes(), sizes)
        ids = single(processor, PROMPTS[0], pictures).input_ids
        assert (ids == IMAGE).sum() == found.shape[1]  # placeholders follow
    mixes = config.method in ("dct", "prumerge")
    torch.testing.assert_close(found, rows, rtol=0, atol=1e-6 if mixes else 1e-9)


@pytest.mark.parametrize("ratio", [None, 0.9, (1.0,) * 6 + (0.6,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_methods_are_given_the_towers_last_keys_and_attention(
    kernel, tower, bias, ratio, pictures, monkeypatch
):
    given = []

    class Spy(Method):
        needs = ("class_attention",)
        prefix_metric = "keys"

        def merge(self, metric, remove, depth=0.0, *, class_attention):
            given.append((metric, class_attention))
            return MergeResult(tome.match(metric, remove))

    monkeypatch.setitem(METHODS, "spy", Spy)
    model, processor = precise(make_model(tower, attn_implementation=kernel)), make_processor(tower)
    early = {"early_method": "pitome", "early_depth": 1.0} if ratio else {}
    config = MergeConfig(method="spy", ratio=ratio, prefix=0.5, proportional=bias, **early)
    pixels = padded(processor, PROMPTS[:2], pictures)["pixel_values"]
    _, keys, seen, sizes = plain(model, pixels, config.lengths(PATCHES, FEATURE), bias)
    with merge_tokens(model, config, processor):
        made(model, pixels)
    metric, attention = given[-1]
    torch.testing.assert_close(attention.double(), seen, rtol=0, atol=1e-6)
    torch.testing.assert_close(metric, keys[:, -sizes.shape[1] :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_batch_is_its_rows_and_every_patch_is_somewhere(config, pictures):
    model, processor = precise(make_model()), make_processor()
    with merge_tokens(model, config, processor) as merging:
        inputs = padded(processor, PROMPTS, pictures)
        together = run(model, inputs).logits
        slot, sizes = trace(merging.plans()), merging.sizes()
        assert slot.shape == (4, PATCHES) and slot.max() == sizes.shape[1] - 1
        counts = torch.stack([torch.bincount(s, minlength=sizes.shape[1]) for s in slot])
        if config.method in ("pitome", "tome", "random", "grid", "visionzip"):  # nothing is dropped
            assert torch.equal(counts, sizes.long())
        for row, prompt in enumerate(PROMPTS):
            found = run(model, alone(processor, prompt, pictures)).logits[0]
            torch.testing.assert_close(together[row, -len(found) :], found, rtol=0, atol=1e-7)
        assert all(len(answer) == 6 for answer in generate(model, inputs))


def test_survivors_keep_raster_order_unless_the_method_lays_them_out(model, processor, pictures):
    pixels, found = padded(processor, PROMPTS, pictures)["pixel_values"].float(), {}
    for order in ("raster", "method"):
        with merge_tokens(model, MergeConfig(prefix=0.5, order=order), processor) as merging:
            found[order] = made(model, pixels), merging.projector.tokens
    raster, method = found["raster"][1].plan, found["method"][1].plan
    assert (raster.kept.diff(dim=1) > 0).all()
    assert not (method.kept.diff(dim=1) > 0).all()
    assert torch.equal(method.kept.sort(1).values, raster.kept)
    order = method.kept.argsort(1)
    back = found["method"][0].gather(1, order.unsqueeze(2).expand_as(found["method"][0]))
    assert torch.equal(back, found["raster"][0])
    assert torch.equal(found["method"][1].patch_sizes.gather(1, order), found["raster"][1].patch_sizes)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("method", ["visionzip", "diffrate"])
def test_kernels_of_this_package_leave_keys_and_queries_whole(method, kernels, pictures, monkeypatch):
    """Keys and queries are captured where this package's kernel computes the attention, too."""
    own = []
    monkeypatch.setattr(cpu_attention, "is_faster", lambda _: True)
    monkeypatch.setattr(cpu_attention, "attention", lambda *a: own.append(1) or kernel(*a))
    model, plain_model = make_model(), make_model()
    pixels = padded(make_processor(), PROMPTS, pictures)["pixel_values"].float()
    early = {"early_method": "pitome", "early_depth": 1.0, "ratio": 0.9} if method == "diffrate" else {}
    config = MergeConfig(method=method, prefix=0.5, **early)
    with merge_tokens(model, config, kernels=kernels):
        found = made(model, pixels)
    assert bool(own) == (kernels and method == "diffrate")  # never where the tower merges nothing
    with merge_tokens(plain_model, config, kernels=False):
        torch.testing.assert_close(found, made(plain_model, pixels), rtol=0, atol=1e-5)


def test_gradients_pass_the_prefix_and_labels_train_on_the_short_prompt(model, processor, pictures):
    model.train()
    with merge_tokens(model, MergeConfig(prefix=0.5, prefix_metric="keys"), processor):
        inputs = batch(processor, PROMPTS[:2], pictures)
        labels = inputs.input_ids.masked_fill(inputs.input_ids == IMAGE, -100)
        model(**inputs, labels=labels).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.vision_tower.encoder.layers[0]):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
