import json
import math
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_processor
from test_tower import images
from transformers import LlavaConfig

from llava_pitome import MergeConfig, load, parents
from llava_pitome.cli.bench import run, targets
from llava_pitome.cli.bench.clock import timed
from llava_pitome.cli.bench.memory import peak
from llava_pitome.cli.bench.run import Load, measure
from llava_pitome.cli.bench.sides import compiling, overhead, side, tower
from llava_pitome.cli.bench.summary import brief, quartiles, summarise, table
from llava_pitome.cli.bench.targets import Target, build, inputs
from llava_pitome.cli.main import main

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[1]


@pytest.fixture
def target():
    return Target("tiny", make_model(), True, 36)


def bench(capsys, folder, *words):
    assert main(["bench", *words, "--output", str(folder)]) == 0
    return json.loads((folder / "bench.json").read_text()), capsys.readouterr().out


def test_the_bench_measures_every_side_part_and_batch(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    words = "--target embedded --ratio 0.95,0.8 --batch 1,2 --rounds 2 --warmup 1 --new-tokens 1,3 --text 9"
    found, out = bench(capsys, tmp_path, *words.split())
    rows = found["rows"]
    sides = ["dense", "0.95, own attention", "0.95", "0.8, own attention", "0.8"]
    assert [(r["batch"], r["side"]) for r in rows] == [(b, s) for b in (1, 2) for s in sides]
    assert [r["tokens"] for r in rows[:5]] == [196, 115, 115, 19, 19]
    for row in rows:
        parts = {"tower", "projector", "llm", "prefill", "decode", "answer of 1", "answer of 3"}
        assert set(row["seconds"]) == parts | ({"merging"} if row["merging"] else set())
        assert all(len(taken) == 2 and min(taken) > 0 for taken in row["seconds"].values())
        for i in range(2):
            took = {part: taken[i] for part, taken in row["seconds"].items()}
            assert took["tower"] + took["projector"] + took["llm"] < took["prefill"] == took["answer of 1"]
            assert took["prefill"] + 2 * took["decode"] == pytest.approx(took["answer of 3"])
    assert found["options"]["ratio"] == [0.95, 0.8]
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert out.count("| 196 | 0.8 |") == 2
    assert (tmp_path / "bench.md").read_text() in out
    for name in ("speedup.png", "breakdown.png", "batches.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in out


def test_the_kv_cache_and_the_flops_follow_the_tokens(target):
    sides = [side(target, c, "", True, "off") for c in (None, MergeConfig(tokens=9))]
    dense, merged = measure(sides, Load(2, text=4, new_tokens=(1,), rounds=1, warmup=0))
    heads, width, layers, bytes_ = 2, 8, 3, 4
    for row, tokens in ((dense, 36), (merged, 9)):
        assert row["kv_cache_bytes"] == 2 * layers * 2 * heads * (tokens + 4) * width * bytes_
    assert merged["flops"]["llm"] < 0.4 * dense["flops"]["llm"]
    assert merged["flops"]["projector"] == dense["flops"]["projector"] / 4
    assert merged["peak_bytes"] < dense["peak_bytes"]


def test_sides_share_their_weights_and_leave_the_target_alone(target):
    before = {name: list(m._forward_hooks) for name, m in target.model.named_modules()}
    merged = side(target, MergeConfig(tokens=9), "", True, "off")
    assert all(a is b for a, b in zip(merged.target.model.parameters(), target.model.parameters()))
    assert {name: list(m._forward_hooks) for name, m in target.model.named_modules()} == before
    assert (merged.tokens, side(target, None, "", True, "off").tokens) == (9, 36)


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_the_overhead_is_the_matching_and_merging_of_a_whole_pass(target, recipe, monkeypatch):
    merged = side(target, MergeConfig.recipe(recipe, ratio=0.8), "", True, "off")
    hooks = [list(block.keys._forward_hooks) for block in merged.merging.tower.blocks]
    pixels, seen = images(2), []
    with torch.no_grad():
        merged.target.model.model.vision_tower(pixels)
        slots = [slot.plan.slot for slot in merged.merging.tower.slots[1:]]
        work = overhead(merged, pixels)
        tower = type(merged.merging.tower)
        plain = tower._merge
        monkeypatch.setattr(tower, "_merge", lambda *a: seen.append(a[1]) or plain(*a))
        work()
        assert seen == list(range(7))
        assert all(torch.equal(s.plan.slot, old) for s, old in zip(merged.merging.tower.slots[1:], slots))
        work()  # as often as is wanted
    assert [list(block.keys._forward_hooks) for block in merged.merging.tower.blocks] == hooks


def test_speedups_are_medians_of_rounds_and_efficiency_their_share_of_the_flops():
    facts = {"batch": 1, "patches": 576}
    dense = facts | {"side": "dense", "tokens": 576, "merging": None, "peak_bytes": 2_000_000}
    dense |= {"flops": {"tower": 400}, "seconds": {"tower": [4.0, 8.0, 2.0]}}
    merged = facts | {"side": "0.9", "tokens": 54, "merging": {}, "peak_bytes": 1_000_000}
    merged |= {
        "flops": {"tower": 100},
        "seconds": {"tower": [2.0, 2.0, 2.0], "merging": [0.1, 0.2, 0.3]},
    }
    plain, found = summarise([dense, merged])
    assert found["speedup"]["tower"] == (1.5, 2.0, 3.0)
    assert found["median"]["merging"] == pytest.approx((0.15, 0.2, 0.25))
    assert found["merging_share"] == pytest.approx(0.1)
    assert found["flop_ratio"] == {"tower": 4.0}
    assert found["efficiency"] == {"tower": 0.5}
    assert plain["speedup"]["tower"] == (1, 1, 1)
    assert "| 1 | 576 | 0.9 | 54 | 2000.0 | 2.00 (1.50-3.00) | 4.00 -> 0.50 | 10.0% | 1.0 |" in table(
        [plain, found]
    )
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)


def test_the_clock_tells_stages_in_their_order(target):
    model = target.model
    stages = {
        "first": model.model.vision_tower.encoder.layers[0],
        "second": model.model.vision_tower.encoder.layers[1],
    }
    with torch.no_grad():
        spans = timed(lambda: [model.model.vision_tower(images(1)) for _ in range(2)], stages, CPU)
    assert {name: len(found) for name, found in spans.items()} == {"all": 1, "first": 2, "second": 2}
    steps = [s for pair in zip(spans["first"], spans["second"]) for s in pair]
    times = [t for s in steps for t in (s.start, s.stop)]
    assert times[0] > 0 and times == sorted(times) and times[-1] < spans["all"][0].stop
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stages.values())


def test_the_clock_leaves_no_hook_where_the_work_fails(model):
    layer = model.model.vision_tower.encoder.layers[0]

    def fail():
        raise KeyError("no work")

    with pytest.raises(KeyError, match="no work"):
        timed(fail, {"layer": layer}, CPU)
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    "work, most",
    [
        (lambda: torch.zeros(1000), 4000),
        (lambda: [torch.zeros(1000), torch.zeros(1000)], 8000),
        (lambda: [torch.zeros(1000).sum() for _ in range(9)], 4000 + 9 * 4),
        (lambda: torch.zeros(1000).view(10, 100).t()[3:], 4000),
        (lambda: torch.zeros(1000).add_(1), 4000),
    ],
)
def test_the_peak_is_what_is_there_at_one_time(work, most):
    assert peak(work, CPU) == most


@pytest.mark.parametrize("remove", [1, 57, 288])
@pytest.mark.parametrize("batch, count", [(1, 576), (4, 577), (8, 300), (1, 2304)])
def test_matching_takes_no_more_memory_than_one_matrix_of_similarities(batch, count, remove):
    metric = torch.randn(batch, count, 64, generator=torch.Generator().manual_seed(0))
    assert peak(lambda: parents(metric, min(remove, count // 2)), CPU) <= batch * count**2 * 4


@pytest.mark.parametrize("name, patches", [("tower", 196), ("tower", None)])
def test_the_named_tower_has_the_real_shapes(name, patches):
    target = build(name, torch.bfloat16, "cpu", patches)
    vision = target.model.config.vision_config
    assert target.patches == (patches or 576)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (
        1024,
        24,
        14 * math.isqrt(target.patches),
    )
    assert all(p.isfinite().all() and p.float().std() > 0 for p in target.model.parameters() if p.dim() > 1)
    assert inputs(target, 2, 5, 7)["input_ids"].shape == (2, 12)
    assert not target.answers


def test_a_checkpoint_on_disk_can_be_benchmarked(capsys, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    words = "--ratio 0.8 --batch 3 --rounds 1 --warmup 0 --dtype float32 --kernels off"
    found, _ = bench(capsys, tmp_path / "out", "--target", str(tmp_path / "model"), *words.split())
    assert [(r["side"], r["batch"]) for r in found["rows"]] == [("dense", 3), ("0.8", 3)]


def test_every_compiled_tower_runs_compiled_whatever_was_compiled_before_it(target, monkeypatch):
    ran, plain = [], torch.nn.Module.compile

    def backend(graph, _inputs):
        return lambda *args: ran.append(len(graph.graph.nodes)) or graph.forward(*args)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **_: plain(m, backend=backend, dynamic=False))
    torch.compiler.reset()
    configs = (None, MergeConfig(tokens=9), MergeConfig(tokens=5))
    sides = [side(target, config, "", True, "default") for config in configs]
    few = torch._dynamo.config.patch(recompile_limit=1)  # which the bench has to raise
    with few, compiling(len(configs) * 2), torch.no_grad():
        for batch in (1, 2):
            for one in sides:
                ran.clear()
                tower(one, images(batch))()
                assert len(ran) == 1  # all of it in one graph
                assert ran[0] > 100
    torch.compiler.reset()


def test_the_bench_compiles_both_sides(capsys, tmp_path, monkeypatch):
    asked, plain = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda m, **how: asked.append(how) or plain(m, backend="eager", dynamic=False),
    )
    words = "--target embedded --ratio 0.8 --batch 1 --rounds 1 --warmup 1 --compile default --new-tokens 1"
    found, _ = bench(capsys, tmp_path, *words.split())
    assert asked == [{"mode": "default", "dynamic": False}] * 2
    assert [r["side"] for r in found["rows"]] == ["dense", "0.8"]
    assert "merging" not in found["rows"][1]["seconds"]  # told for what runs by itself only
    torch.compiler.reset()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--ratio 1.2", "'1.2' is not allowed: it must be numbers in (0, 1], separated by commas"),
        ("--ratio 0.9,", "'0.9,' is not allowed"),
        ("--batch 0", "'0' is not allowed: it must be a whole number from 1"),
        ("--rounds many", "'many' is not allowed"),
        ("--patches 577", "patches=577 is not allowed: it must be a square number"),
        ("--target embedded --patches 576", "patches=576 is for tower, llava-7b"),
        ("--target no/such/folder", "neither a folder with a model nor a model on the hub"),
        ("--graphs", "--graphs is for --target tower --device cuda"),
        ("--dtype float16 --device cpu", "hundreds of times slower"),
        ("--recipe mine", "invalid choice: 'mine'"),
        ("--text 9", "--text and --new-tokens are for targets that answer"),
        ("--kernels both --dtype float32", "with and without kernels the same would run here"),
        ("--kernels triton", "--kernels triton is for --device cuda"),
    ],
)
def test_what_cannot_be_benchmarked_is_refused_with_what_is_allowed(
    capsys, monkeypatch, tmp_path, words, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = main(["bench", *words.split(), "--output", str(tmp_path)])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_quick_bench_reports_its_ratios(capsys, tmp_path, report):
    """No time is asserted; the ratios stand in the summary of the test run."""
    found, _ = bench(capsys, tmp_path, "--quick", "--target", "tower")
    dense, *merging = found["rows"]
    assert dense["tokens"] == 576
    for merged in merging:
        assert merged["tokens"] == 54
        assert merged["flop_ratio"]["tower"] == pytest.approx(2.86, abs=0.01)
        report(
            f"CLIP-L/14-336 tower, ratio {merged['side']}, batch 1, bfloat16, medians of 3 rounds: "
            f"{merged['speedup']['tower'][1]:.2f} x dense, merging {merged['merging_share']:.1%} of the tower"
        )


def test_the_bench_is_a_command_of_the_package():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"llava-pitome": "llava_pitome.cli.main:main"}
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_quick_fills_in_only_what_is_not_given(capsys, tmp_path):
    words = "--quick --target embedded --ratio 0.8 --rounds 1 --kernels off --profile"
    found, _ = bench(capsys, tmp_path, *words.split())
    assert [r["side"] for r in found["rows"]] == ["dense", "0.8"]
    assert found["options"]["warmup"] == 1
    assert all(len(r["seconds"]["answer of 16"]) == 1 for r in found["rows"])
    profile = (tmp_path / "profile.md").read_text()
    assert profile.count("| operation | ms | share | calls |") == 2
    assert "aten::addmm" in profile


def test_another_side_goes_first_in_every_round(target, monkeypatch):
    sides, order = [side(target, c, str(c), True, "off") for c in (None, MergeConfig(tokens=9))], []
    plain = run._timing
    monkeypatch.setattr(run, "_timing", lambda s, load: lambda: order.append(s.tokens) or plain(s, load)())
    measure(sides, Load(1, text=4, new_tokens=(1,), rounds=3, warmup=0))
    assert order == [36, 9, 9, 36, 36, 9]


def test_the_brief_table_tells_merging_sides_only():
    facts = {"batch": 1, "patches": 576, "merging": {"ratio": 0.9}, "side": "0.9", "tokens": 54}
    row = facts | {
        "speedup": {"tower": (1, 3.5, 4), "answer of 16": (1, 2, 3)},
        "median": {"answer of 16": 1},
    }
    row |= {"flop_ratio": {"tower": 2.86}, "efficiency": {"tower": 1}, "merging_share": 0.04321}
    assert "| 1 | 576 | 0.9 | 54 | 4.3% | 3.50 (2.86) | 2.00 |\n" in brief([row])
    assert brief([row]) == brief([row, row | {"merging": None}])


def test_a_random_models_processor_cuts_the_patches_that_its_tower_sees():
    processor = targets.fitting(LlavaConfig())
    sizes = processor._get_num_multimodal_tokens(image_sizes=[(500, 300)])
    vision = LlavaConfig().vision_config
    assert sizes["num_image_tokens"] == [(vision.image_size // vision.patch_size) ** 2]


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_random_checkpoint_loads_and_answers_merged(command, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(targets, "CLIP_L", {**targets.CLIP_L, **targets.SMALL, "num_hidden_layers": 3})
    monkeypatch.setattr(targets, "LLAMA_7B", targets.SMALL | {"vocab_size": 32064})
    if command == "eval":
        from eval import random_model

        assert random_model.main([f"output={tmp_path}"]) == 0
    else:
        from train import bench

        assert bench._random(tmp_path / bench.SHAPES) == bench._random(tmp_path / bench.SHAPES)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "llava-7b-2layer"
    model, processor = load(str(folder), MergeConfig(tokens=20))
    inputs = processor(images=pictures[0], text="USER: <image>\nhow many? ASSISTANT:", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 20
    said = model.generate(**inputs.to(model.dtype), max_new_tokens=2, do_sample=False)
    assert said.shape[1] > inputs["input_ids"].shape[1]
