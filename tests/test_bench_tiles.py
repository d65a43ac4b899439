"""The bench of models that cut images into tiles."""

import json

import pytest
import torch
from tiled import make_tiled

from llava_pitome import MergeConfig, apply, remove
from llava_pitome.cli.bench import targets
from llava_pitome.cli.bench.targets import TILED_TARGETS, build, make_inputs, target_of
from llava_pitome.cli.bench.timing import Workload, measure, replay_merges, time_stages
from llava_pitome.cli.bench.variants import make_variant
from llava_pitome.cli.main import main
from llava_pitome.models.hf_llava import find

CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 128}


@pytest.fixture
def small(monkeypatch):
    """Named targets of few channels; their tiles and tokens are the real ones."""
    monkeypatch.setattr(targets, "CLIP_L", targets.CLIP_L | TINY | {"num_hidden_layers": 3})
    monkeypatch.setattr(targets, "SIGLIP", targets.SIGLIP | TINY | {"num_hidden_layers": 2})
    monkeypatch.setattr(targets, "LLAMA_7B", TINY)
    monkeypatch.setattr(targets, "QWEN2_7B", TINY | {"model_type": "qwen2", "num_key_value_heads": 1})


@pytest.fixture
def bench(capsys, tmp_path):
    """Runs the command; returns bench.json and what was printed."""

    def run(words):
        assert main(["bench", *words.split(), "--output", str(tmp_path)]) == 0
        return json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "name, tokens, tiles, parameters",
    [("next-7b", 2928, 5, 7.06e9), ("onevision-7b", 3699, 5, 8.03e9)],
)
def test_named_targets_have_the_shapes_and_tokens_of_the_real_models(name, tokens, tiles, parameters):
    target = build(name, torch.bfloat16, "meta")
    assert sum(p.numel() for p in target.model.parameters()) == pytest.approx(parameters, rel=0.002)
    assert (target.layout.tokens, target.layout.tiles, target.generates) == (tokens, tiles, True)
    assert target.patches == tiles * find(target.model).patches
    two_layers = build(f"{name}-2layer", torch.bfloat16, "meta")
    assert len(two_layers.model.model.language_model.layers) == 2


@pytest.mark.parametrize(
    "name, size, tokens", [("next-7b-2layer", (336, 672), 1752), ("onevision-7b-2layer", (1152, 1152), 7371)]
)
def test_an_image_of_another_size_has_other_tokens(name, size, tokens, small):
    target = build(name, torch.float32, "cpu", size=size)
    assert target.layout.tokens == tokens
    inputs = make_inputs(target, 2, tokens, 5)
    assert inputs["image_sizes"].tolist() == [list(size)] * 2
    assert inputs["pixel_values"].shape[:2] == (2, target.layout.tiles)
    assert target.model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", ["next-7b-2layer", "onevision-7b-2layer"])
def test_the_bench_measures_budgets_of_tokens_beside_the_dense_model(name, small, bench):
    words = "--tokens 640,160 --batch 1 --rounds 1 --warmup 0 --new-tokens 1,2 --dtype float32 --kernels on"
    results, out = bench(f"--target {name} {words}")
    dense, *merged = results["rows"]
    assert [row["tokens"] for row in merged] == [640, 160]
    assert [row["side"] for row in merged] == ["640 tokens", "160 tokens"]
    assert dense["tokens"] == build(name, torch.float32, "meta").layout.tokens
    for row in results["rows"]:
        assert row["tiles"] == 5
        seconds = {part: values[0] for part, values in row["seconds"].items()}
        parts = ("tower", "projector", "packing", "llm")
        assert all(seconds[part] > 0 for part in parts)
        assert sum(seconds[part] for part in parts) < seconds["prefill"] == seconds["answer of 1"]
    assert [row["flop_ratio"]["prefill"] > 1 for row in merged] == [True, True]
    assert "| tiles | tower, GFLOPs a tile |" in out and "packing, ms" in out
    assert f"| 5 | {dense['flops']['tower'] / 5e9:.1f} |" in out


def test_budgets_of_tokens_are_for_models_of_one_tile_too(bench):
    results, _ = bench(
        "--target embedded --tokens 50 --batch 1 --rounds 1 --warmup 0 --new-tokens 1 --kernels on --quick"
    )
    assert [row["tokens"] for row in results["rows"]] == [196, 50]
    assert "tower, GFLOPs a tile" not in results["rows"][0]


def test_shared_layers_are_those_of_one(small):
    plain, shared = (
        build("next-7b-2layer", torch.float32, "cpu", size=(336, 672), shares_layers=share)
        for share in (False, True)
    )
    layers = shared.model.model.language_model.layers
    assert all(a is b for a, b in zip(layers[0].parameters(), layers[1].parameters(), strict=True))
    assert layers[0] is not layers[1]
    of_layer = sum(p.numel() for p in layers[0].parameters())
    counts = [sum(p.numel() for p in target.model.parameters()) for target in (plain, shared)]
    assert counts[0] - counts[1] == of_layer
    inputs = make_inputs(shared, 1, shared.layout.tokens, 4)
    assert torch.equal(shared.model(**inputs).logits, plain.model(**inputs).logits)  # one block repeated
    variant = make_variant(shared, MergeConfig(tokens=100))
    assert sum(p.numel() for p in variant.target.model.parameters()) == counts[1]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--target next-7b --patches 576", "patches=576 is for tower, llava-7b"),
        ("--target tower --image-size 672x672", "an image size of 672x672 is for models that cut images"),
        ("--target embedded --image-size 672x672", "'embedded' takes images of one size"),
        ("--target embedded --shared-layers", "shared layers are for tower, llava-7b"),
        ("--target next-7b --image-size 672", "'672' is not allowed: it must be height x width"),
        ("--target next-7b --image-size 0x9", "'0x9' is not allowed"),
        ("--target next-7b --tokens 640 --ratio 0.9", "--ratio and --tokens both say how far to merge"),
        ("--target next-7b --tokens 0", "'0' is not allowed: it must be whole numbers from 1"),
        ("--target next-7b-2layer --tokens 2929", "tokens=2929 does not fit: this image has 2928 tokens"),
        ("--target next-7b-2layer --compile default", "--compile is for targets whose images are one tile"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(words, message, small, capsys, tmp_path):
    try:
        status = main(["bench", "--output", str(tmp_path), "--dtype", "float32", *words.split()])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["next-mistral", "onevision"])
def test_every_part_of_a_tiled_model_is_measured(kind):
    target = target_of(kind, make_tiled(kind), (50, 100))
    configs = (None, MergeConfig(tokens=40), MergeConfig(tokens=40, prefix_share=0.5))
    variants = [make_variant(target, config) for config in configs]
    rows = measure(variants, Workload(2, text=4, new_tokens=(1,), rounds=1, warmup=0))
    assert [row["tokens"] for row in rows] == [target.layout.tokens, 40, 40]
    assert [set(row["seconds"]) - {"merging"} for row in rows] == [
        {"tower", "projector", "packing", "llm", "prefill", "answer of 1"}
    ] * 3
    assert rows[1]["flops"]["tower"] < rows[0]["flops"]["tower"]
    assert rows[1]["kv_cache_bytes"] < rows[0]["kv_cache_bytes"]
    with torch.no_grad():
        pixels = make_inputs(target, 2, 40, 4)["pixel_values"]
        assert replay_merges(variants[0], pixels) is None
        replay_merges(variants[1], pixels)()


@pytest.mark.parametrize("merges", [False, True])
def test_the_clock_gives_methods_back_that_it_timed(merges):
    model = make_tiled("next-vicuna")
    if merges:
        apply(model, MergeConfig(tokens=40))
    before = vars(model.model).get("get_image_features")
    target = target_of("tiny", model, (50, 100))
    inputs = make_inputs(target, 1, 40 if merges else target.layout.tokens, 3)
    timed = {"features": (model.model, "get_image_features"), "tower": model.model.vision_tower}
    with torch.no_grad():
        spans = time_stages(lambda: model.generate(**inputs, max_new_tokens=2), timed, CPU)
        (features,), (tower,) = spans["features"], spans["tower"]
        assert features[0] < tower[0] < tower[1] < features[1]
        with pytest.raises(KeyError, match="no work"):
            time_stages(lambda: {}["no work"], timed, CPU)
    assert vars(model.model).get("get_image_features") is before
    assert (before is not None) == merges
    if merges:
        remove(model)
    assert "get_image_features" not in vars(model.model)


def test_tiled_targets_are_the_last_names():
    assert all(name.startswith(("next-7b", "onevision-7b")) for name in TILED_TARGETS)
