"""Evaluations of models that cut images into tiles, through lmms-eval: sizes, several images, videos."""

import json
import shlex
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_tiled_loading import processor_of
from tiled import make_tiled, noise, takes_videos

from eval import recipe, run
from eval.command import child_environment
from eval.evaluation import model_costs
from eval.evaluation.tasks import check_frames, tasks_for
from llava_pitome import MergeConfig, merge_tokens
from llava_pitome.cli.options import parse
from llava_pitome.embedded import NAME_NEXT, dataset
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.integrations import lmms_eval_questions
from llava_pitome.integrations.lmms_eval import LlavaPitome
from llava_pitome.models.hf_llava import find

PICTURES, EACH = 3, 2
TEMPLATE = (
    "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '> ' }}{% endif %}{% endfor %} is"
)
RECIPES = {file.stem: file for file in recipe.RECIPES}


def save(kind, folder):
    model, processor = make_tiled(kind), processor_of(kind)
    processor.chat_template = TEMPLATE
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def sizes(data):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(data / dataset.FILE), split="train")
    return [row["image"].size[::-1] for row in rows]


@pytest.fixture(scope="module")
def next_folder(tmp_path_factory):
    return save("next-mistral", tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about images of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    dataset.write(folder, pictures=PICTURES, each=EACH, model=NAME_NEXT)
    assert len(set(sizes(folder))) > 1
    return folder


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_run_reports_the_means_over_its_images(batch_size, next_folder, data, tmp_path):
    given = [f"model={next_folder}", f"data={data}", "tokens_per_tile=9", f"batch_size={batch_size}"]
    assert run.main([*given, "dtype=float32", f"output={tmp_path}"]) == 0
    plain, merged = json.loads((tmp_path / "results.json").read_text())["rows"]
    model = make_tiled("next-mistral")
    tiling, layers = find(model).llava.tiling, find(model).num_feature_layers
    for row, config in ((plain, None), (merged, MergeConfig(tokens_per_tile=9))):
        config = config or MergeConfig(ratio=1.0)
        tokens = [tokens_of_image(config, layers, tiling.image(*size)) for size in sizes(data)]
        assert row["samples"] == PICTURES * EACH == row["timed_samples"]
        assert row["image_tokens"] == row["llm_tokens"] == pytest.approx(sum(tokens) / len(tokens))
        assert row["prompt_tokens"] > row["image_tokens"]
    for part in ("tower", "projector", "llm"):
        assert 0 < merged[f"{part}_gflops"] < plain[f"{part}_gflops"]


def test_lmms_evals_own_task_runs_on_a_tiled_model(next_folder, data, tmp_path):
    (tmp_path / "lmms-lab-encoder").mkdir()
    (tmp_path / "lmms-lab-encoder" / "VQAv2").symlink_to(data)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "llava_pitome", "--tasks", "vqav2_val",
        "--batch_size", "4", "--model_args", f"pretrained={next_folder},tokens=60,dtype=float32",
        "--output_path", "out",
    ]  # fmt: skip
    environment = child_environment({"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")})
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (path,) = (tmp_path / "out").glob("**/*results.json")
    results = json.loads(path.read_text())
    assert results["n-samples"]["vqav2_val"]["effective"] == PICTURES * EACH
    assert "exact_match,none" in results["results"]["vqav2_val"]


def evaluator(folder, **options):
    model = LlavaPitome(folder, dtype="float32", **options)
    model.task_dict = {"a_task": {"val": [{} for _ in range(9)]}}
    return model


def requests(visuals, contexts=("what is this", "two red", "a cat or", "dog")):
    settings = {"max_new_tokens": 3, "min_new_tokens": 3}
    return [
        SimpleNamespace(args=(context, settings, lambda _, own=own: own, i, "a_task", "val"))
        for i, (own, context) in enumerate(zip(visuals, contexts * 3))
    ]


def answer(model, batch):
    """The answers of a batch, and those of each question alone."""
    together, cost = model._answer(batch)
    alone = [model._answer([request]) for request in batch]
    assert together == [answers[0] for answers, _ in alone]
    totals = {key: sum(each[key] for _, each in alone) for key in cost}
    assert cost == pytest.approx(totals)
    return together, cost


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
@pytest.mark.parametrize("options", [{}, {"ratio": 0.8}, {"tokens_per_tile": 5, "recipe": "best"}])
def test_questions_with_several_images_of_several_sizes_are_answered_as_alone(kind, options, tmp_path):
    model = evaluator(save(kind, tmp_path), **options)
    images = [noise(*size, seed) for seed, size in enumerate([(50, 100), (130, 40), (90, 90)])]
    batch = requests([[images[0]], images, [], [images[1], images[0]], [images[0]]])
    answers, cost = answer(model, batch)
    assert any(answers) and cost["images"] == 7 and cost["prompts"] == 5
    inputs = model.inputs(model.questions(batch))
    placeholders = (inputs["input_ids"] == model.model.config.image_token_id).sum()
    assert cost["image_tokens"] == placeholders
    assert cost["prompt_tokens"] == inputs["attention_mask"].sum()


@pytest.fixture
def videos(monkeypatch):
    """Video files whose names say how many frames they have; the frames that are read of each."""
    read = []

    def read_video(path, frames):
        count = int(path.removesuffix(".mp4").rpartition("-")[2])
        read.append(min(count, frames))
        return [noise(50, 60, seed) for seed in range(read[-1])]

    monkeypatch.setattr(lmms_eval_questions, "read_video", read_video)
    return read


@pytest.mark.parametrize("kind", ["next-video", "onevision"])
@pytest.mark.parametrize("options", [{}, {"ratio": 0.8}, {"tokens_per_frame": 3}])
def test_questions_about_videos_are_answered_as_alone(kind, options, tmp_path, videos):
    model = evaluator(save(kind, tmp_path), frames=3, **options)
    batch = requests([["a-8.mp4"], ["a-2.mp4"], ["a-8.mp4"], ["b-3.mp4"]])
    answers, cost = answer(model, batch)
    assert any(answers) and cost["images"] == 4
    assert videos[:4] == [3, 2, 3, 3]
    token = model.model.config.video_token_id
    inputs = [model.inputs(model.questions([request])) for request in batch]
    assert cost["image_tokens"] == sum(int((x["input_ids"] == token).sum()) for x in inputs)


def test_several_images_are_the_frames_of_a_video_where_frames_are_asked_for(tmp_path):
    model = evaluator(save("onevision", tmp_path), frames=3)
    shown = [noise(50, 60, seed) for seed in range(7)]
    (question, single) = model.questions(requests([shown, shown[:1]]))
    assert [frame.tobytes() for frame in question.videos[0]] == [shown[i].tobytes() for i in (0, 3, 6)]
    assert (question.images, question.frames) == ([], (3,)) and "<video>" in question.prompt
    assert (len(single.images), single.videos) == (1, []) and "<image>" in single.prompt


@pytest.mark.parametrize("total, count", [(7, 3), (180, 32), (5, 5), (2, 8), (9, 1), (1, 1)])
def test_frames_are_evenly_spaced(total, count):
    found = lmms_eval_questions._evenly(total, count)
    assert len(found) == min(total, count) and sorted(set(found)) == found
    assert count == 1 or (found[0], found[-1]) == (0, total - 1)
    steps = [b - a for a, b in pairwise(found)]
    assert not steps or max(steps) - min(steps) <= 1
    assert count > 1 or found == [total // 2]


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_blank_images_are_zero_after_preprocessing(kind, tmp_path):
    model = evaluator(save(kind, tmp_path), blank=True)
    inputs = model.inputs(model.questions(requests([[noise(96, 96)]])))
    assert inputs["pixel_values"].abs().max() < 0.02
    assert inputs["image_sizes"].tolist() == [[96, 96]]


@pytest.mark.parametrize(
    "visuals, context, message",
    [
        (["a-8.mp4"], "what", "a-8.mp4 is a video: give frames=, the number that is read of each"),
        (["dir/A.MKV"], "what", "A.MKV is a video"),
        ([], "<image> what", "the question has 1 <image> but comes with 0 images"),
        ([noise(9, 9)], "<image> <image>", "the question has 2 <image> but comes with 1 images"),
        ([noise(9, 9)], "<video> what", "the question has 1 <video> but comes with 0 videos"),
    ],
)
def test_visuals_that_do_not_fit_a_question_raise(visuals, context, message, tmp_path):
    model = evaluator(save("onevision", tmp_path))
    with pytest.raises(ValueError, match=message):
        model.questions(requests([visuals], (context,)))


@pytest.mark.parametrize("frames", [0, -1, "many", 2.5])
def test_wrong_numbers_of_frames_are_refused_before_anything_is_loaded(frames, monkeypatch):
    with pytest.raises(ValueError, match=f"frames={frames!r} is not allowed: it must be a whole number"):
        LlavaPitome("embedded", frames=frames)


def test_frames_are_refused_for_a_model_that_takes_no_videos(next_folder):
    with pytest.raises(ValueError, match="frames=8 is not allowed: a LlavaNextProcessor takes no videos"):
        LlavaPitome(next_folder, frames=8)


@pytest.mark.parametrize(
    "words, message",
    [
        (["tasks=videomme"], "tasks=videomme has videos: say how many frames of each to read, as frames=32"),
        (["tasks=mvbench"], "tasks=mvbench_action_sequence has videos"),
        (["tasks=gqa", "frames=8"], "frames=8 is for tasks with videos; tasks=gqa has images"),
        (["tasks=videomme,gqa", "frames=8"], "tasks=gqa has images"),
        (["frames=8"], "tasks=vqav2_val has images"),
        (["tasks=videomme", "frames=0"], "frames='0' is not allowed"),
        (["tasks=videomme", "frames=8", "tokens=64"], "tokens=64 is the budget of an image"),
        (["tasks=videomme", "frames=8", "tokens_per_frame=197"], "a frame has 196 tokens"),
        (["tokens=7372"], "tokens=7372 does not fit: this image has 7371 tokens"),
        (["tokens_per_frame=9"], "nothing says"),
        (["tasks=mvbenchs", "frames=8"], "lmms-eval has no such task"),
    ],
)  # fmt: skip
def test_words_that_do_not_fit_the_model_or_its_tasks_are_errors(words, message, capsys, offline):
    given = ["model=llava-hf/llava-onevision-qwen2-7b-ov-hf", "dry_run=true"]
    status = run.main([*given, *words])
    printed = capsys.readouterr()
    if message == "nothing says":  # of images, they merge nothing
        assert status == 0 and "unmerged: 7371 image tokens" in printed.out
        return
    assert status == 2
    assert message in printed.err


def test_a_group_stands_for_its_tasks():
    found = tasks_for(("gqa", "mvbench", "vqav2_val"), "hub")
    assert (found[0], found[-1], len(found)) == ("gqa", "vqav2_val", 22)
    assert all(name.startswith("mvbench_") for name in found[1:-1])
    check_frames(found[1:-1], "hub", 8)
    check_frames(("vqav2_val",), "embedded", None)


@pytest.fixture
def offline(monkeypatch):
    """Makes every checkpoint unreachable."""

    def unreachable(path):
        raise ValueError("no hub")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # which is read once
    monkeypatch.setattr(model_costs.checkpoints, "patches_and_layers", unreachable)
    model_costs.model_shapes.cache_clear()
    yield
    model_costs.model_shapes.cache_clear()


@pytest.mark.parametrize(
    "name, parameters, size, tokens",
    [
        ("llava-v1.6-vicuna-7b-hf", 7.06e9, (672, 672), 2928),
        ("llava-v1.6-vicuna-13b-hf", 13.35e9, (672, 672), 2928),
        ("llava-v1.6-mistral-7b-hf", 7.57e9, (672, 672), 2928),
        ("llava-onevision-qwen2-7b-ov-hf", 8.03e9, (1152, 1152), 7371),
    ],
)
def test_built_in_shapes_are_those_of_the_checkpoints(name, parameters, size, tokens, offline):
    found = model_costs.model_shapes(f"llava-hf/{name}", "sdpa", built_in=True)
    assert found.built_in
    assert sum(p.numel() for p in found.parts.model.parameters()) == pytest.approx(parameters, rel=0.002)
    assert found.parts.llava.tiling.nominal_size == size
    assert found.cost(None, 60).tokens == tokens
    assert f"one image of {size[0]} x {size[1]} pixels" in found.describe_input()


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_the_recipes_run_dry_with_the_tokens_that_they_name(name, capsys, offline):
    assert recipe.main([str(RECIPES[name]), "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert "are those built in" in printed and "FLOPs by formula" in printed
    prepared = recipe.prepare(RECIPES[name], ["dry_run=true"])
    runs = [each for found in prepared.folders.values() for each in found]
    unmerged = {each.plan.options["frames"]: each.plan.cost(None) for each in runs}
    for each in runs:
        run_name, budget = each.combination.name, each.combination.tokens
        assert run_name in printed
        cost = each.plan.cost(each.combination.config)
        if run_name == "unmerged":
            assert cost == unmerged[each.plan.options["frames"]]
            continue
        assert cost.flops.total < 0.6 * unmerged[each.plan.options["frames"]].flops.total
        if run_name.startswith("sparsevlm"):
            assert cost.llm_tokens == pytest.approx(budget, rel=0.03)
        elif run_name.startswith("fastv"):
            assert each.combination.config.decoder == {1: budget}
        else:
            assert cost.tokens - budget in (0, 1)  # a newline token ends a video


def lines(name):
    """The words of every run of a recipe."""
    every, found = [], []
    for line in RECIPES[name].read_text().splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "every":
            every += words[1:]
        elif words:
            found.append(dict(word.split("=", 1) for word in (*every, *words)))
    return found


@pytest.mark.parametrize(
    "name, words",
    [(name, words) for name in ("next", "onevision") for words in lines(name)],
    ids=lambda x: x if isinstance(x, str) else x["name"],
)
def test_every_run_of_a_recipe_generates(name, words):
    """On a tiny model, with budgets of which as many tokens are left as its images are smaller."""
    left_out = ("name", "budget", "tasks", "model", "frames", "batch_size")
    own = {k: v for k, v in words.items() if k not in left_out}
    for key, scale, least in (("tokens", 20, 20), ("prefix", 20, 20), ("tokens_per_frame", 8, 2)):
        if key in own:
            own[key] = str(max(int(own[key]) // scale, least))
    if "decoder" in own:  # in layers that there are
        amounts = [amount.partition(":")[2] for amount in own["decoder"].split(",")][:2]
        own["decoder"] = ",".join(
            f"{layer}:{amount if '.' in amount else int(amount) // 20}"
            for layer, amount in enumerate(amounts)
        )
    options = parse([f"{k}={v}" for k, v in own.items()], run.OPTIONS)
    config = run.merge_config(options)
    kind = "next-vicuna" if name == "next" else "onevision"
    model, processor = make_tiled(kind), processor_of(kind)
    with merge_tokens(model, config, processor), torch.no_grad():
        if "frames" in words:
            assert takes_videos(kind)
            frames = [noise(50, 60, seed) for seed in range(4)]
            inputs = processor(videos=[frames], text="<video> what is", return_tensors="pt")
        else:
            images = [noise(90, 90), noise(50, 100)]
            inputs = processor(
                images=images, text=["<image> what", "a <image> is"], return_tensors="pt", padding=True
            )
        assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == len(
            inputs["input_ids"]
        )
