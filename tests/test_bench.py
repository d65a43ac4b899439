import json
import math

import pytest
import torch
from conftest import SIDE, make_model

from llava_pitome import MergeConfig, load, parents
from llava_pitome.cli.bench import targets
from llava_pitome.cli.bench.memory import peak_bytes
from llava_pitome.cli.bench.report import full_table, short_table, summarise
from llava_pitome.cli.bench.targets import Target, build, make_inputs, make_processor
from llava_pitome.cli.bench.timing import Workload, measure, replay_merges, time_stages
from llava_pitome.cli.bench.variants import compile_limit, make_variant
from llava_pitome.cli.main import main
from llava_pitome.hooks.merge_step import MergeStep

CPU = torch.device("cpu")
BF16_KERNEL = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.fixture
def target():
    return Target("tiny", make_model(), True, 36)


@pytest.fixture
def bench(capsys, tmp_path):
    """Runs the command; returns bench.json and what was printed."""

    def run(words, output="--output"):
        assert main(["bench", *words.split(), output, str(tmp_path)]) == 0
        return json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out

    return run


def make_pixels(batch):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def hook_counts(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_bench_measures_every_variant_part_and_batch(bench, tmp_path, monkeypatch):
    for name, value in zip(BF16_KERNEL, (True, False)):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
    words = "--target embedded --ratio 0.95,0.8 --batch 1,2 --rounds 2 --warmup 1 --new-tokens 1,3 --text 9"
    results, out = bench(words)
    rows = results["rows"]
    labels = ["dense", "0.95, own attention", "0.95", "0.8, own attention", "0.8"]
    assert [(r["batch"], r["side"]) for r in rows] == [(b, label) for b in (1, 2) for label in labels]
    assert [r["tokens"] for r in rows[:5]] == [196, 115, 115, 19, 19]
    for row in rows:
        parts = {"tower", "projector", "llm", "prefill", "decode", "answer of 1", "answer of 3"}
        assert set(row["seconds"]) == parts | ({"merging"} if row["merging"] else set())
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["seconds"].values())
        for i in range(2):
            s = {part: seconds[i] for part, seconds in row["seconds"].items()}
            assert s["tower"] + s["projector"] + s["llm"] < s["prefill"] == s["answer of 1"]
            assert s["prefill"] + 2 * s["decode"] == pytest.approx(s["answer of 3"])
    assert results["options"]["ratio"] == [0.95, 0.8]
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert out.count("| 196 | 0.8 |") == 2
    assert (tmp_path / "bench.md").read_text() in out
    for name in ("speedup.png", "breakdown.png", "batches.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in out


def test_quick_sets_only_what_is_not_given(bench, tmp_path):
    results, _ = bench("--quick --target embedded --ratio 0.8 --rounds 1 --kernels off --profile", "-o")
    assert [r["side"] for r in results["rows"]] == ["dense", "0.8"]
    assert results["options"]["warmup"] == 1
    assert all(len(r["seconds"]["answer of 16"]) == 1 for r in results["rows"])
    profile = (tmp_path / "profile.md").read_text()
    assert profile.count("| operation | ms | share | calls |") == 2
    assert "aten::addmm" in profile


def test_the_quick_bench_reports_its_ratios(bench, report):
    """Times are not asserted; the ratios stand in the summary of the test run."""
    results, _ = bench("--quick --target tower --kernels on")
    dense, *merging = results["rows"]
    assert dense["tokens"] == 576
    for row in merging:
        assert row["tokens"] == 54
        assert row["flop_ratio"]["tower"] == pytest.approx(2.86, abs=0.01)
        report(
            f"CLIP-L/14-336 tower, ratio {row['side']}, batch 1, bfloat16, medians of 3 rounds: "
            f"{row['speedup']['tower'][1]:.2f} x dense, merging {row['merging_share']:.1%} of the tower"
        )


def test_a_checkpoint_on_disk_can_be_benchmarked(bench, saved):
    words = "--ratio 0.8 --batch 3 --rounds 1 --warmup 0 --dtype float32 --kernels off"
    results, _ = bench(f"--target {saved} {words}")
    assert [(r["side"], r["batch"]) for r in results["rows"]] == [("dense", 3), ("0.8", 3)]


def test_compile_compiles_all_towers(bench, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _module, **options: modes.append(options))
    words = "--target embedded --ratio 0.8 --batch 1 --rounds 1 --warmup 1 --compile default --new-tokens 1"
    results, _ = bench(words)
    assert modes == [{"mode": "default", "dynamic": False}] * 2
    assert [r["side"] for r in results["rows"]] == ["dense", "0.8"]
    assert "merging" not in results["rows"][1]["seconds"]  # compiled merges do not run by themselves


@pytest.mark.parametrize(
    "words, message",
    [
        ("--ratio 1.2", "'1.2' is not allowed: it must be numbers in (0, 1], separated by commas"),
        ("--ratio 0.9,", "'0.9,' is not allowed"),
        ("--batch 0", "'0' is not allowed: it must be whole numbers from 1, separated by commas"),
        ("--rounds many", "'many' is not allowed: it must be a whole number from 1"),
        ("--patches 577", "patches=577 is not allowed: it must be a square number"),
        ("--target embedded --patches 576", "patches=576 is for tower, llava-7b"),
        ("--target no/such/folder", "neither a folder with a model nor a model on the hub"),
        ("--graphs", "--graphs is for --target tower --device cuda"),
        ("--dtype float16 --device cpu", "hundreds of times slower"),
        ("--recipe mine", "'mine' is not allowed: it must be paper | "),
        ("--text 9", "--text and --new-tokens are for targets that generate"),
        ("--kernels both --dtype float32", "kernels make no difference here; allowed is on or off"),
        ("--kernels triton", "--kernels triton is for --device cuda"),
        (f"--output {__file__}", "is not allowed: it must be a folder, not a file"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["bench", "--output", str(tmp_path), *words.split()])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_variants_share_weights_and_leave_the_target_unchanged(target):
    before = hook_counts(target.model)
    merged = make_variant(target, MergeConfig(tokens=9))
    assert all(a is b for a, b in zip(merged.target.model.parameters(), target.model.parameters()))
    assert hook_counts(target.model) == before
    assert (merged.tokens, make_variant(target, None).tokens) == (9, 36)


def test_every_tower_runs_compiled_however_many_were_compiled_before(target, monkeypatch):
    ran, compile_module = [], torch.nn.Module.compile

    def backend(graph, _inputs):
        return lambda *args: ran.append(len(graph.graph.nodes)) or graph.forward(*args)

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **_: compile_module(m, backend=backend, dynamic=False)
    )
    torch.compiler.reset()
    configs = (None, MergeConfig(tokens=9))
    variants = [make_variant(target, config, compile_mode="default") for config in configs]
    default = torch._dynamo.config.patch(recompile_limit=1)  # which compile_limit raises
    with default, compile_limit(len(configs) * 2), torch.no_grad():
        for batch in (1, 2):
            for variant in variants:
                ran.clear()
                variant.encode(make_pixels(batch))
                assert len(ran) == 1  # one graph
                assert ran[0] > 100
    torch.compiler.reset()


def test_kv_cache_flops_and_memory_follow_the_tokens(target):
    variants = [make_variant(target, config) for config in (None, MergeConfig(tokens=9))]
    dense, merged = measure(variants, Workload(2, text=4, new_tokens=(1,), rounds=1, warmup=0))
    heads, width, layers, itemsize = 2, 8, 3, 4
    for row, tokens in ((dense, 36), (merged, 9)):
        assert row["kv_cache_bytes"] == 2 * layers * 2 * heads * (tokens + 4) * width * itemsize
    assert merged["flops"]["llm"] < 0.4 * dense["flops"]["llm"]
    assert merged["flops"]["projector"] == dense["flops"]["projector"] / 4
    assert merged["peak_bytes"] < dense["peak_bytes"]


def test_every_round_starts_with_another_variant(target):
    order, variants = [], [make_variant(target, config) for config in (None, MergeConfig(tokens=9))]
    for variant in variants:
        variant.target.model.register_forward_hook(lambda *_, tokens=variant.tokens: order.append(tokens))
    measure(variants, Workload(1, text=4, new_tokens=(1,), rounds=3, warmup=0))
    assert order[:6] == [36, 9, 9, 36, 36, 9]


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_replayed_merges_are_those_of_a_whole_pass(target, recipe, monkeypatch):
    variant = make_variant(target, MergeConfig.recipe(recipe, ratio=0.8), kernels=False)
    merge, merged = MergeStep.merge, []

    def spy(*args, **kwargs):
        hidden, *rest = merge(*args, **kwargs)
        merged.append(hidden)
        return hidden, *rest

    with torch.no_grad():
        variant.encode(make_pixels(1))  # transformers installs hooks of its own at the first call
        hooks = hook_counts(variant.target.model)
        monkeypatch.setattr(MergeStep, "merge", spy)
        replay = replay_merges(variant, make_pixels(2))
        assert MergeStep.merge is spy
        assert hook_counts(variant.target.model) == hooks
        once = list(merged)
        assert [x.shape[1] for x in once] == [n + 1 for n in variant.handle.config.lengths(36, 7)[1:]]
        for _ in range(2):
            merged.clear()
            replay()
            assert len(merged) == 7 and all(map(torch.equal, merged, once))


@pytest.mark.parametrize(
    "config", [None, MergeConfig(prefix=9), MergeConfig(tokens=9, method="diffrate")], ids=str
)
def test_merges_are_not_replayed_without_all_their_cost(target, config):
    with torch.no_grad():
        assert replay_merges(make_variant(target, config), make_pixels(1)) is None


def test_the_clock_times_stages_in_their_order(target):
    tower = target.model.model.vision_tower
    stages = {"first": tower.encoder.layers[0], "second": tower.encoder.layers[1]}
    with torch.no_grad():
        spans = time_stages(lambda: [tower(make_pixels(1)) for _ in range(2)], stages, CPU)
    assert {name: len(calls) for name, calls in spans.items()} == {"total": 1, "first": 2, "second": 2}
    readings = [x for calls in zip(spans["first"], spans["second"]) for call in calls for x in call]
    assert readings[0] > 0 and readings == sorted(readings) and readings[-1] < spans["total"][0][1]


def test_the_clock_removes_its_hooks_where_the_work_fails(model):
    def fail():
        raise KeyError("no work")

    before = hook_counts(model)
    with pytest.raises(KeyError, match="no work"):
        time_stages(fail, {"tower": model.model.vision_tower}, CPU)
    assert hook_counts(model) == before


@pytest.mark.parametrize(
    "work, peak",
    [
        (lambda: torch.zeros(1000), 4000),
        (lambda: [torch.zeros(1000), torch.zeros(1000)], 8000),
        (lambda: [torch.zeros(1000).sum() for _ in range(9)], 4000 + 9 * 4),
        (lambda: torch.zeros(1000).view(10, 100).t()[3:], 4000),
        (lambda: torch.zeros(1000).add_(1), 4000),
    ],
)
def test_the_peak_counts_tensors_that_exist_at_one_time(work, peak):
    assert peak_bytes(work, CPU) == peak


@pytest.mark.parametrize("remove", [1, 57, 288])
@pytest.mark.parametrize("batch, count", [(1, 576), (4, 577), (8, 300), (1, 2304)])
def test_matching_takes_no_more_memory_than_one_similarity_matrix(batch, count, remove):
    metric = torch.randn(batch, count, 64, generator=torch.Generator().manual_seed(0))
    assert peak_bytes(lambda: parents(metric, min(remove, count // 2)), CPU) <= batch * count**2 * 4


def test_speedups_are_quartiles_of_rounds_and_efficiency_is_their_share_of_the_flop_ratio():
    dense = {"batch": 1, "patches": 576, "side": "dense", "tokens": 576, "merging": None}
    merged = dense | {"side": "0.9", "tokens": 54, "merging": {}}
    dense |= {"peak_bytes": 2_000_000, "flops": {"tower": 400}, "seconds": {"tower": [4.0, 8.0, 2.0]}}
    merged |= {"peak_bytes": 1_000_000, "flops": {"tower": 100}}
    merged |= {"seconds": {"tower": [2.0, 2.0, 2.0], "merging": [0.1, 0.2, 0.3]}}
    plain, summary = summarise([dense, merged])
    assert summary["speedup"]["tower"] == (1.5, 2.0, 3.0)
    assert summary["median"]["merging"] == pytest.approx((0.15, 0.2, 0.25))
    assert summary["merging_share"] == pytest.approx(0.1)
    assert summary["flop_ratio"] == {"tower": 4.0}
    assert summary["efficiency"] == {"tower": 0.5}
    assert plain["speedup"]["tower"] == (1, 1, 1)
    line = "| 1 | 576 | 0.9 | 54 | 2000.0 | 2.00 (1.50-3.00) | 4.00 -> 0.50 | 10.0% | 1.0 |"
    assert line in full_table([plain, summary])


def test_one_round_is_its_own_quartiles():
    row = {"batch": 1, "patches": 36, "flops": {"tower": 1}, "seconds": {"tower": [5.0]}}
    assert summarise([row])[0]["median"]["tower"] == (5.0, 5.0, 5.0)


def test_the_short_table_holds_merging_variants_alone():
    row = {
        "batch": 1,
        "patches": 576,
        "merging": {"ratio": 0.9},
        "side": "0.9",
        "tokens": 54,
        "speedup": {"tower": (1, 3.5, 4), "answer of 1": (1, 2, 3), "answer of 16": (1, 2, 3)},
        "flop_ratio": {"tower": 2.86},
        "merging_share": 0.04321,
    }
    table = short_table([row | {"merging": None}, row])
    assert table.endswith("| --- |\n| 1 | 576 | 0.9 | 54 | 4.3% | 3.50 (2.86) | 2.00 |\n")


@pytest.mark.parametrize("patches", [196, None])
def test_the_named_tower_has_the_real_shapes(patches):
    target = build("tower", torch.bfloat16, "cpu", patches)
    vision = target.model.config.vision_config
    assert target.patches == (patches or 576)
    assert (vision.hidden_size, vision.num_hidden_layers) == (1024, 24)
    assert vision.image_size == 14 * math.isqrt(target.patches)
    assert all(p.isfinite().all() and p.float().std() > 0 for p in target.model.parameters() if p.dim() > 1)
    assert make_inputs(target, 2, 5, 7)["input_ids"].shape == (2, 12)
    assert not target.generates


def test_the_processor_of_a_random_model_counts_the_patches_of_its_tower():
    from transformers import LlavaConfig

    vision = LlavaConfig().vision_config
    sizes = make_processor(LlavaConfig())._get_num_multimodal_tokens(image_sizes=[(500, 300)])
    assert sizes["num_image_tokens"] == [(vision.image_size // vision.patch_size) ** 2]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_random_checkpoint_loads_and_generates_merged(command, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(targets, "CLIP_L", {**targets.CLIP_L, **targets.SMALL, "num_hidden_layers": 3})
    monkeypatch.setattr(targets, "LLAMA_7B", targets.SMALL | {"vocab_size": 32064})
    if command == "eval":
        from eval import random_model

        assert random_model.main([f"output={tmp_path}"]) == 0
    else:
        from train import bench

        path = tmp_path / bench.RANDOM_MODELS[0]
        assert bench._random_model(path) == bench._random_model(path)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "llava-7b-2layer"
    model, processor = load(str(folder), MergeConfig(tokens=20))
    inputs = processor(images=pictures[0], text="USER: <image>\nhow many? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 20
    output = model.generate(**inputs.to(model.dtype), max_new_tokens=2, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
