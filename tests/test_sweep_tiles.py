"""Sweeps, reports and ablations of models that cut images into tiles, at shares of an image's tokens."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_eval_tiles import save
from test_report import SCORES, by_name
from test_report import write as write_report
from tiled import inputs_of, make_tiled, make_tiled_processor, prompts_of

from eval import ablate
from eval.embedded_accuracy import EmbeddedEvaluation
from eval.embedded_images import embedded_image
from eval.naming import amount, amount_phrase
from eval.report import summary, tables
from eval.report.__main__ import main as report
from eval.report.examples import find_examples
from eval.report.rows import make_rows
from eval.report.sweep_results import read_sweep
from eval.sweep import __main__ as sweep
from eval.sweep.combinations import combinations, place_fields
from llava_pitome import METHODS, MergeConfig, merge_tokens
from llava_pitome.cli.options import parse
from llava_pitome.embedded import NAME_NEXT, dataset
from llava_pitome.embedded.questions import HINT
from llava_pitome.models.hf_llava import find

PATCHES, SHARE = 36, 0.3
NAMES = ["unmerged", "pitome-tower-0.3", "resize-input-0.3", "thumbnail-input-0.3"]


def combine(**changes) -> list:
    defaults = {"methods": ["paper"], "places": ["tower"], "tokens": [0.1], "seeds": [0], "patches": 196}
    return combinations(**defaults | {"is_tiled": True} | changes)[1:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Saved models by kind, with random weights."""
    kinds = ("next-vicuna", "onevision")
    return {kind: Path(save(kind, tmp_path_factory.mktemp(kind))) for kind in kinds}


@pytest.mark.parametrize(
    ("share", "text"), [(0.1, "10 %"), (0.05, "5 %"), (0.07, "7 %"), (0.125, "12.5 %"), (39, "39"), (1, "1")]
)
def test_shares_are_written_as_percentages(share, text):
    assert amount(share) == text
    assert amount_phrase(share) == (f"{text} of tokens" if isinstance(share, float) else f"{text} tokens")


def test_configs_merge_in_their_places_down_to_a_share():
    found = combine(methods=["tome"], places=["tower", "prefix", "tower+prefix", "decoder:2"])
    assert [(c.tokens, c.config) for c in found] == [
        (0.1, MergeConfig(tokens=0.1, method="tome")),
        (0.1, MergeConfig(tokens=0.1, prefix_share=1.0, method="tome")),
        (0.1, MergeConfig(tokens=0.1, prefix_share=0.5, method="tome")),
        (0.1, MergeConfig(decoder={2: 0.1}, method="tome")),
    ]


@pytest.mark.parametrize("patches", [36, 49, 196, 576, 729])
def test_resized_tiles_are_the_largest_squares_within_a_share(patches):
    sides = range(1, round(patches**0.5))
    shares = [side * side / patches for side in sides] + [0.05, 0.1, 0.2, 0.3, 0.5, 0.99]
    for c in combine(methods=["resize"], tokens=shares, patches=patches):
        rows, columns = c.config.resize
        assert c.place == "input" and rows == columns
        assert rows**2 <= c.tokens * patches + 1e-6 < (rows + 1) ** 2
    found = combine(methods=["resize"], tokens=shares, patches=patches)
    assert [c.config.resize[0] for c in found[: len(sides)]] == list(sides)


def test_a_share_of_less_than_a_patch_is_skipped_with_the_reason():
    (found,) = combine(methods=["resize"], tokens=[0.01], patches=36)
    assert found.config is None and found.skipped == "less than one of a tile's 36 patches is left"


def test_the_thumbnail_is_a_control_for_tiles_alone():
    (tiled,) = combine(methods=["thumbnail"])
    assert (tiled.place, tiled.config) == ("input", MergeConfig(tile_shares="thumbnail", tokens=0.1))
    (other,) = combine(methods=["thumbnail"], tokens=[39], is_tiled=False)
    assert other.skipped == "the images of this model have no thumbnail"


@pytest.mark.parametrize("tokens", ["10", "0.5,3", "1.0", "1"])
def test_numbers_of_tokens_are_refused_where_images_have_different_ones(tokens, folders, tmp_path, capsys):
    model = f"model={folders['next-vicuna']}"
    assert sweep.main([model, f"tokens={tokens}", f"output={tmp_path / 'out'}", "data=embedded-next"]) == 2
    error = capsys.readouterr().err
    assert "this model cuts images into tiles" in error and "give the share to keep, in (0, 1)" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokens", ["0.1", "39,0.5", "1.0"])
def test_shares_are_refused_where_images_are_one_tile(tokens, tmp_path, capsys):
    assert sweep.main([f"tokens={tokens}", f"output={tmp_path / 'out'}"]) == 2
    assert "every image of this model has 196 patches; give how many tokens" in capsys.readouterr().err


def test_by_default_shares_down_to_five_per_cent_are_compared(folders, tmp_path):
    words = [f"model={folders['next-vicuna']}", "data=embedded-next", "methods=paper,resize", "places=prefix"]
    runs = sweep.make_runs(parse(words, sweep.OPTIONS), tmp_path)
    of_method = [run.combination.tokens for run in runs if run.combination.method == "pitome"]
    assert of_method == [0.5, 0.3, 0.2, 0.1, 0.05]


@pytest.mark.parametrize("kind", ["next-vicuna", "onevision"])
def test_every_combination_runs_or_is_skipped_with_a_reason(kind, folders, tmp_path):
    """What is not skipped leaves the share of each image's tokens at the language model."""
    words = [f"model={folders[kind]}", "data=embedded-next", f"tokens={SHARE}", "seeds=0"]
    runs = sweep.make_runs(parse(words, sweep.OPTIONS), tmp_path)
    found = {(run.combination.method, run.combination.place): run.combination for run in runs[1:]}
    model, processor, prompts = make_tiled(kind), make_tiled_processor(kind), prompts_of(kind)["images"]
    tiling = find(model).llava.tiling
    stock = [tiling.image(p.images[0].height, p.images[0].width).tokens for p in prompts if p.images]
    for (method, place), c in found.items():
        if c.skipped:
            assert c.config is None and (method in c.skipped or "class" in c.skipped), c.skipped
            continue
        with merge_tokens(model, c.config, processor), torch.no_grad():
            inputs = inputs_of(processor, prompts)
            model(**inputs, logits_to_keep=1)
        tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1)
        counts = [n for n in tokens.tolist() if n]
        if place.startswith("decoder"):
            assert counts == stock
        elif method == "thumbnail":
            assert all(n <= max(SHARE * all_tokens + 1, 1) for n, all_tokens in zip(counts, stock))
        elif method != "resize":
            assert counts == [pytest.approx(SHARE * n, abs=1) for n in stock], c.name
    assert {method for method, _ in found} == {*METHODS, "released", "best", "resize", "thumbnail"}
    assert found["grid", "decoder:1"].skipped.startswith("method 'grid' works on the grid of patches")


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> Path:
    """A sweep of a few questions about images of different sizes."""
    output = tmp_path_factory.mktemp("sweep") / "output"
    dataset.write(output.parent / "data", pictures=3, each=2, model=NAME_NEXT)
    words = [
        f"model={folders['next-vicuna']}",
        f"data={output.parent / 'data'}",
        "methods=paper,resize,thumbnail",
    ]
    words += ["places=tower", f"tokens={SHARE}", "rounds=1", "dtype=float32", f"output={output}"]
    assert sweep.main(words) == 0
    return output


def test_a_sweep_reports_the_means_over_images(finished):
    listed = json.loads((finished / "sweep.json").read_text())["combinations"]
    assert [(c["name"], c["tokens"]) for c in listed] == [
        (n, SHARE if n != "unmerged" else None) for n in NAMES
    ]
    rows = by_name(make_rows(read_sweep(finished), "vqav2_val_folder", resamples=100))
    images = [embedded_image(seed, NAME_NEXT) for seed in range(3)]
    tiling = find(make_tiled("next-vicuna")).llava.tiling
    stock = [tiling.image(image.height, image.width).tokens for image in images]
    assert rows["unmerged"].image_tokens == pytest.approx(sum(stock) / 3)
    assert rows["pitome-tower-0.3"].image_tokens == pytest.approx(SHARE * sum(stock) / 3, abs=1)
    assert rows["thumbnail-input-0.3"].image_tokens <= PATCHES
    assert all(row.times["prefill"][1] > 0 for row in rows.values())
    assert report([f"input={finished}", "draws=100"]) == 0
    text = (finished / "report" / "report.md").read_text()
    assert "thumbnail only" in text and "| 30 % |" in text and "30 % of tokens" in text


TOKENS_AT_LLM = {"unmerged": 160.5, "decoder": 160.5, "input": 15.25}


def write_shares(folder: Path, model: str) -> None:
    """The made-up sweep of the report's tests, at a tenth of the tokens; one method is the thumbnail."""
    write_report(folder, task="embedded_next_vqa", model=model)
    facts = json.loads((folder / "sweep.json").read_text())
    for c in (c for c in facts["combinations"] if c.get("config")):
        if c["name"] == "best-tower-39":
            c |= {"method": "thumbnail", "place": "input"}
            fields = {"tile_shares": "thumbnail", "tokens": 0.1}
        elif c["method"] == "resize":
            fields = {"resize": [2, 2]}
        else:
            kept = {k: c["config"][k] for k in ("method", "parameters", "llm_proportional", "positions")}
            fields = kept | place_fields(c["place"], 0.1)
        c |= {"tokens": 0.1, "config": MergeConfig.from_dict(fields).to_dict()}
    for c in (c for c in facts["combinations"] if c.get("folder")):
        file = folder / c["folder"] / "results.json"
        result = json.loads(file.read_text())
        kind = c["place"].partition(":")[0] or "unmerged"
        result["rows"][0] |= {"merging": c["config"], "image_tokens": TOKENS_AT_LLM.get(kind, 16.1)}
        file.write_text(json.dumps(result))
    (folder / "sweep.json").write_text(json.dumps(facts))


@pytest.fixture
def shares(folders, tmp_path) -> Path:
    """A made-up sweep at a tenth of the tokens."""
    write_shares(tmp_path, str(folders["next-vicuna"]))
    return tmp_path


def test_a_report_says_shares_as_percentages(shares):
    found = make_rows(read_sweep(shares), "embedded_next_vqa", resamples=500)
    assert list(tables.short_table(found).columns) == ["method", "place", "10 % of tokens"]
    full = tables.full_table(found)
    assert set(full["tokens"]) == {"", "10 %"} and set(full["tokens at the LLM"]) == {
        "160.5",
        "16.1",
        "15.25",
    }
    lines = [*summary.same_place(found), *summary.across_places(found, "cross")]
    assert all(line.startswith("At 10 % of tokens, ") for line in lines)
    assert re.search(r"thumbnail only at the input \(", lines[-1])
    assert re.search(r"resize at the input \(", lines[-1])


def test_plots_are_drawn_at_the_measured_tokens(shares):
    rows = by_name(make_rows(read_sweep(shares), "embedded_next_vqa", resamples=100))
    assert rows["pitome-tower-39"].kept_tokens == 16.1
    assert rows["fastv-decoder-1-39"].kept_tokens == pytest.approx(16.05)
    assert rows["resize-input-39"].kept_tokens == 15.25 and rows["unmerged"].kept_tokens == 160.5


def test_only_methods_in_the_language_model_see_all_tokens_first(shares):
    rows = make_rows(read_sweep(shares), "embedded_next_vqa", resamples=100)
    assert {row.name for row in rows if row.merges_late} == {"fastv-decoder-1-39"}


def test_differences_are_paired_by_question_as_for_other_models(shares):
    found = by_name(make_rows(read_sweep(shares), "embedded_next_vqa", resamples=200))
    assert found["tome-tower-39"].same is not None and found["best-tower-39"].cross is not None
    assert found["best-tower-39"].same is None  # nothing else is at the input
    assert len(found) == len(SCORES) - 1


def test_example_images_show_tiles(shares):
    sweep_results = read_sweep(shares)
    rows = make_rows(sweep_results, "embedded_next_vqa", resamples=100)
    examples, about = find_examples(sweep_results, rows, 2)
    assert len(examples) == 2 and "at 10 % of tokens" in about
    for example in examples:
        answers = {answer.title: answer for answer in example.answers}
        assert "thumbnail only at the input, 10 % of tokens" in answers
        drawn = {answer.image for answer in answers.values()}
        assert len(drawn) > 4 and example.image.startswith("data:image/png;base64,")
    assert report([f"input={shares}", "draws=100", "examples=1"]) == 0
    assert (shares / "report" / "plots" / "embedded_next_vqa-tokens.png").exists()


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_answers_to_encoded_images_are_those_to_the_images(recipe, folders):
    """Questions about a part of a batch, whose images have different numbers of tokens."""
    evaluation = EmbeddedEvaluation(0, 4, model=str(folders["next-vicuna"]))
    model, processor = evaluation.model, evaluation.processor
    images = [embedded_image(seed, NAME_NEXT) for seed in range(4)]
    with merge_tokens(model, MergeConfig.recipe(recipe, tokens=0.2), processor), torch.inference_mode():
        encoded = model.get_image_features(**evaluation._images[0], return_dict=True).pooler_output
        features = [encoded[i] for i in (1, 1, 3)]
        questions = [evaluation._questions[i][0] for i in (1, 2, 3)]
        found = evaluation._generate(features, questions)
        text = [f"<image> {q.text}{HINT} is" for q in questions]
        inputs = processor(
            images=[images[i] for i in (1, 1, 3)], text=text, padding=True, return_tensors="pt"
        )
        out = model.generate(**inputs.to(torch.bfloat16), max_new_tokens=5, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        expected = [x.strip() for x in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
    assert len({len(f) for f in encoded}) > 1 and any(expected)
    assert found == expected


def test_an_ablation_of_tiles_compares_each_change_with_its_recipe(folders, tmp_path, monkeypatch, capsys):
    rows = {
        name: {ablate.WHOLE: fields, "newlines: none": fields | {"newlines": "none"}}
        for name, fields in ablate.TILED_RECIPES.items()
    }
    monkeypatch.setattr(ablate, "TILED_ROWS", rows)
    words = [f"model={folders['next-vicuna']}", "pictures=2", "jobs=1", f"output={tmp_path}"]
    assert ablate.main(words) == 0
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert found["questions"] == 6 and len(found["rows"]) == 4
    assert all(list(row["tokens"]) == ["0.2", "0.1", "0.05"] for row in found["rows"])
    table = (tmp_path / "ablations.md").read_text().splitlines()
    assert table[0] == "| setting | changed to | 20 % of tokens | 10 % of tokens | 5 % of tokens |"
    assert ["±" in line for line in table[2:]] == [False, True, False, True]


def test_every_setting_of_tiles_is_ablated_on_every_recipe():
    for recipe, changes in ablate.TILED_ROWS.items():
        configs = [MergeConfig.recipe("paper", tokens=0.1, **fields) for fields in changes.values()]
        assert {c.newlines for c in configs} == {"rows", "scaled", "none"}
        assert {c.tile_shares for c in configs} == {"area", "equal", "joint", "attention", "thumbnail"}
        assert {c.across_tiles for c in configs} == {True, False}
        assert len(set(configs)) == len(configs), recipe


def test_a_model_that_is_not_there_is_an_error(tmp_path, capsys):
    assert ablate.main([f"model={tmp_path / 'nowhere'}", f"output={tmp_path / 'out'}"]) == 2
    assert "nowhere" in capsys.readouterr().err and not (tmp_path / "out").exists()
