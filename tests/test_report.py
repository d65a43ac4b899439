"""Statistics against brute force, and a report whose numbers are those of the answers."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from eval.naming import file_name
from eval.report import summary, tables
from eval.report.__main__ import main
from eval.report.rows import make_rows
from eval.report.significance import holm, intervals, p_values, sum_by_image
from eval.report.sweep_results import read_sweep
from llava_pitome import MergeConfig

QUESTIONS, EACH = 60, 3
TYPES = ("yes/no", "number", "other")
SCORES = {  # accuracy by name in the sweep
    "unmerged": 0.95,
    "pitome-tower-39": 0.8,
    "tome-tower-39": 0.75,
    "random-tower-39-seed0": 0.4,
    "random-tower-39-seed1": 0.3,
    "pitome-prefix-39": 0.5,
    "grid-prefix-39": 0.9,
    "fastv-decoder-1-39": 0.9,
    "resize-input-39": 0.5,
    "best-tower+prefix-39": 0.9,
    "best:tome-tower+prefix-39": 0.6,
    "best-tower-39": 0.7,
}


def config_of(name: str) -> dict | None:
    if name == "unmerged":
        return None
    method, place, *_ = name.split("-")
    amount = {"tower": {"tokens": 39}, "prefix": {"prefix": 39}, "decoder": {"decoder": {1: 39}}}
    if method == "resize":
        return MergeConfig(resize=(6, 6)).to_dict()
    if method.startswith("best"):
        share = {"tower": {"prefix_share": 0.0}}.get(place, {})
        own = {"method": "tome", "parameters": {}} if ":" in method else {}
        return MergeConfig.recipe("best", tokens=39, **share, **own).to_dict()
    draw = {"parameters": {"seed": int(name[-1])}} if "seed" in name else {}
    return MergeConfig(method=method, **draw, **amount[place]).to_dict()


def place_of(name: str) -> str:
    return "" if name == "unmerged" else name.split("-")[1].replace("decoder", "decoder:1")


def write(
    folder: Path,
    task: str = "embedded_vqa",
    scored: bool = True,
    with_images: bool = True,
    model: str = "embedded",
) -> dict:
    """A sweep as eval.sweep writes it, with made-up answers; returns the scores by name."""
    rng = np.random.default_rng(0)
    made, listed = {}, []
    for name, rate in SCORES.items():
        config, method = config_of(name), name.split("-")[0]
        scores = made[name] = rng.choice([0.0, 0.3, 1.0], QUESTIONS, p=[1 - rate, 0.1, rate - 0.1])
        answers = [
            {"doc_id": i, "question_id": (i // EACH) * 1000 + i % EACH, "question": f"what {i}?",
             "answer": ["a"], "answer_type": TYPES[i % 3], "multiple_choice_answer": "b"}
            | ({"image_id": i // EACH} if with_images else {})
            | ({"exact_match": float(scores[i])} if scored else {})
            for i in range(QUESTIONS)
        ]  # fmt: skip
        (folder / name / "answers").mkdir(parents=True)
        (folder / name / "answers" / f"{task}-{file_name(name)}.jsonl").write_text(
            "".join(json.dumps(a) + "\n" for a in answers)
        )
        kinds = {kind: {"mean": 100 * scores[j::3].mean()} for j, kind in enumerate(TYPES)}
        row = {
            "task": task, "model": name, "merging": config, "image_tokens": 39 if config else 196,
            "llm_tokens": 39.0, "tower_gflops": 1.0, "projector_gflops": 0.5, "llm_gflops": 2.0,
            "accuracy": {"mean": 100 * scores.mean()} if scored else None,
            "by_answer_type": kinds if scored else {},
            "metrics": {"score,none": rate, "score_stderr,none": 0.1},
        }  # fmt: skip
        (folder / name / "results.json").write_text(json.dumps({"rows": [row], "fingerprint": "f"}))
        listed.append(
            {"name": name, "method": method, "place": place_of(name), "tokens": 39 if config else None,
             "seed": int(name[-1]) if "seed" in name else None, "skipped": None, "config": config,
             "folder": name}
        )  # fmt: skip
    skipped = {
        "name": "dct-input-39",
        "method": "dct",
        "place": "x",
        "tokens": 39,
        "skipped": "not defined there",
    }
    facts = {"model": model, "patches": 196, "fingerprint": "f", "limit": None, "dtype": "auto"}
    (folder / "sweep.json").write_text(json.dumps(facts | {"combinations": [*listed, skipped]}))
    return made


@pytest.mark.parametrize("images", [1, 3, 9])
def test_p_values_of_few_images_enumerate_every_choice_of_signs(images):
    differences = np.random.default_rng(images).integers(-3, 4, (images, 5)) / 3
    for column, found in zip(differences.T, p_values(differences)):
        sums = [abs(sum(s * d for s, d in zip(signs, column))) for signs in product((1, -1), repeat=images)]
        assert found == pytest.approx(np.mean([s >= abs(column.sum()) - 1e-9 for s in sums]))


def test_p_values_of_many_images_approximate_every_choice_of_signs():
    differences = np.random.default_rng(1).normal(0.3, 1, (18, 4))
    signs = np.array(list(product((1.0, -1.0), repeat=18)))
    exact = (np.abs(signs @ differences) >= np.abs(differences.sum(0)) - 1e-9).mean(0)
    assert p_values(differences, resamples=20_000) == pytest.approx(exact, abs=0.015)
    assert np.array_equal(p_values(differences), p_values(differences))  # seeded


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(2)
    p = p_values(rng.choice([-1.0, 0.0, 1.0], (60, 2000)), resamples=2000)
    assert 0.02 < (p < 0.05).mean() < 0.09
    assert 0.4 < np.median(p) < 0.65


def test_images_without_a_difference_do_not_count():
    differences = np.array([[1.0], [1.0], [-1.0], [1.0]])
    assert p_values(differences) == p_values(np.concatenate([differences, np.zeros((500, 1))]))
    assert p_values(np.zeros((30, 2))).tolist() == [1, 1]


def test_intervals_cover_the_true_mean_in_95_per_cent_of_trials():
    rng = np.random.default_rng(3)
    held = 0
    for trial in range(200):
        easy = rng.beta(2, 1, (80, 1))  # questions about one image correlate
        sums, counts = sum_by_image(
            (rng.random((80, 3)) < easy).reshape(-1, 1) * 1.0, np.repeat(range(80), 3)
        )
        (low,), (high,) = intervals(sums, counts, resamples=400, seed=trial)
        held += low <= 2 / 3 <= high
    assert 0.9 <= held / 200 <= 0.99


def test_intervals_are_wider_where_questions_share_images():
    scores = np.repeat(np.random.default_rng(4).integers(0, 2, 100), 3)[:, None] * 1.0
    shared = intervals(*sum_by_image(scores, np.repeat(range(100), 3)))
    alone = intervals(*sum_by_image(scores, range(300)))
    assert (shared[1] - shared[0])[0] == pytest.approx(np.sqrt(3) * (alone[1] - alone[0])[0], rel=0.1)


def test_images_with_more_questions_weigh_more():
    sums, counts = sum_by_image(np.array([[1.0], [0.0], [1.0], [1.0]]), ["a", "b", "a", "a"])
    assert (sums.tolist(), counts.tolist()) == ([[3], [0]], [3, 1])


def test_holms_method_gives_the_values_computed_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.fixture
def sweep(tmp_path):
    return tmp_path, write(tmp_path)


def by_name(found: list) -> dict:
    return {row.name: row for row in found}


def test_the_numbers_of_a_row_come_from_its_answers(sweep):
    folder, made = sweep
    found = by_name(make_rows(read_sweep(folder), "embedded_vqa", resamples=500))
    assert len(found) == len(SCORES) - 1  # two seeds are one row
    drawn = found["random-tower-39-seed0"]
    assert drawn.seeds == 2
    both = (made["random-tower-39-seed0"] + made["random-tower-39-seed1"]) / 2
    assert drawn.score == pytest.approx(100 * both.mean())
    tome, pitome = made["tome-tower-39"], made["pitome-tower-39"]
    assert found["tome-tower-39"].same.mean == pytest.approx(100 * (tome - pitome).mean())
    assert found["tome-tower-39"].of_base == pytest.approx(100 * tome.mean() / made["unmerged"].mean())
    assert found["grid-prefix-39"].same.mean == pytest.approx(
        100 * (made["grid-prefix-39"] - made["pitome-prefix-39"]).mean()
    )
    differences = (tome - pitome).reshape(-1, EACH).sum(1)[:, None]
    assert found["tome-tower-39"].same.p == pytest.approx(
        p_values(differences, resamples=500, seed=1)[0], abs=0.05
    )
    for row in found.values():
        assert row.interval[0] <= row.score <= row.interval[1]
        assert sum(row.by_type.values()) / 3 == pytest.approx(row.score)
        assert row.gflops["total"] == 3.5
    assert found["pitome-tower-39"].same is None and found["unmerged"].same is None


def test_methods_are_compared_across_places_in_their_own_place(sweep):
    folder, made = sweep
    found = by_name(make_rows(read_sweep(folder), "embedded_vqa", resamples=500))
    at_home = {
        "tome-tower-39", "random-tower-39-seed0", "grid-prefix-39", "fastv-decoder-1-39", "resize-input-39",
        "best-tower+prefix-39", "best:tome-tower+prefix-39", "pitome-tower-39"
    }  # fmt: skip
    assert {name for name, row in found.items() if row.cross} == at_home - {"pitome-tower-39"}
    assert {name for name, row in found.items() if row.best} == at_home - {"best-tower+prefix-39"}
    for name in ("grid-prefix-39", "best:tome-tower+prefix-39"):
        difference = made[name] - made["best-tower+prefix-39"]
        assert found[name].best.mean == pytest.approx(100 * difference.mean())
    fastv = made["fastv-decoder-1-39"] - made["pitome-tower-39"]
    assert found["fastv-decoder-1-39"].cross.mean == pytest.approx(100 * fastv.mean())


def test_sentences_agree_with_the_numbers(sweep):
    folder, _ = sweep
    found = make_rows(read_sweep(folder), "embedded_vqa", resamples=2000)
    (tower, prefix) = summary.same_place(found)
    assert re.search(r"all in the tower, PiToMe .* is better than random \(\+\d+\.\d, p = ", tower)
    assert re.search(r"does not differ significantly from .*tome", tower)
    assert re.search(r"all at the prefix, PiToMe .* is worse than grid \(-\d+", prefix)
    (cross,) = summary.across_places(found, "cross")
    assert cross.startswith("At 39 tokens, each in its own place, PiToMe in the tower (")
    (best,) = summary.across_places(found, "best")
    assert "own place, PiToMe (best) in the tower and at the prefix (" in best
    assert re.search(r"is better than .*tome \(with the settings of best\) in the tower and at the pre", best)
    assert "PiToMe in the tower (+" in best and "PiToMe (best) in the tower (" not in best
    assert "fastv at LLM layer 1* (" in cross and "grid at the prefix (" in cross


def test_markdown_csv_and_html_have_the_same_numbers(sweep, capsys):
    folder, made = sweep
    assert main([f"input={folder}", "draws=500", "examples=2"]) == 0
    output = folder / "report"
    page, text = (output / "report.html").read_text(), (output / "report.md").read_text()
    raw = {row["name"]: row for row in csv.DictReader(io.StringIO((output / "report.csv").read_text()))}
    assert float(raw["tome-tower-39"]["score"]) == pytest.approx(100 * made["tome-tower-39"].mean())
    for name in ("tome-tower-39", "fastv-decoder-1-39"):
        row = raw[name]
        cell = f"{float(row['score']):.1f} [{float(row['low']):.1f}, {float(row['high']):.1f}]"
        assert cell in page and cell in text
    assert "Skipped: dct in x, not defined there" in text
    assert {p.name for p in (output / "plots").iterdir()} == {
        "embedded_vqa-tokens.png", "embedded_vqa-flops.png", "embedded_vqa-types.png"
    }  # fmt: skip
    assert all(f"plots/{p.name}" in text for p in (output / "plots").iterdir())
    assert "is better than" in capsys.readouterr().out


class PageParser(HTMLParser):
    """Collects what a page loads, and checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.loads, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(sweep):
    folder, _ = sweep
    assert main([f"input={folder}", "draws=100", "examples=2"]) == 0
    page = (folder / "report" / "report.html").read_text()
    found = PageParser()
    found.feed(page)
    assert found.open == []
    assert len(found.loads) >= 3 + 2 * 6  # plots, and an image per method and example
    assert all(load.startswith("data:image/png;base64,") for load in found.loads)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "&#10003; right" in page and "&#10007; wrong" in page
    assert "true answer: <b>b</b>" in page


def test_a_task_without_scores_per_answer_is_reported_unpaired(tmp_path, capsys):
    write(tmp_path, task="mme", scored=False)
    assert main([f"input={tmp_path}", "draws=100"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "have no scores of their own, so images cannot be paired: score,none" in text
    assert "| score |" in text and "difference to PiToMe" not in text
    assert "embedded benchmark only" in (tmp_path / "report" / "report.html").read_text()
    found = by_name(make_rows(read_sweep(tmp_path), "mme"))
    assert found["pitome-tower-39"].of_base == pytest.approx(100 * 0.8 / 0.95)


def test_questions_of_unknown_images_count_as_independent_and_the_report_says_so(tmp_path):
    write(tmp_path, task="gqa", with_images=False)
    assert main([f"input={tmp_path}", "draws=100"]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "gqa does not say which questions share an image" in text


def test_missing_and_outdated_results_are_named(sweep):
    folder, _ = sweep
    (folder / "tome-tower-39" / "results.json").unlink()
    path = folder / "grid-prefix-39" / "results.json"
    path.write_text(path.read_text().replace('"fingerprint": "f"', '"fingerprint": "g"'))
    assert main([f"input={folder}", "draws=100", "examples=0"]) == 0
    text = (folder / "report" / "report.md").read_text()
    assert "WITHOUT RESULTS, and so not in this report: tome-tower-39" in text
    assert "RESULTS OF OTHER CODE OR DATA than the last command's: grid-prefix-39" in text


def test_milliseconds_and_memory_come_from_the_timing(sweep):
    folder, _ = sweep
    parts = {"prefill": [0.01, 0.02, 0.03], "answer of 4": [0.1, 0.2, 0.3]}
    side = {"median": parts, "peak_bytes": 2**21, "kv_cache_bytes": 2**20}
    rows = [side | {"side": name} for name in SCORES if not name.endswith("seed1")]
    options = {"rounds": 3, "text": 24, "new_tokens": 4}
    machine = {"processor": "a processor", "threads": 2, "device": "cpu"}
    (folder / "timing.json").write_text(json.dumps({"rows": rows, "options": options, "machine": machine}))
    found = make_rows(read_sweep(folder), "embedded_vqa", resamples=100)
    line = tables.full_table(found).set_index("method").loc["random (2 draws)"]
    assert line["prefill, ms"] == "20.0 (10.0-30.0)" and line["answer of 4, ms"] == "200.0 (100.0-300.0)"
    assert (line["peak, MiB"], line["KV, MiB"]) == ("2", "1")
    assert main([f"input={folder}", "draws=100", "examples=0"]) == 0
    assert (folder / "report" / "plots" / "embedded_vqa-milliseconds.png").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "sweep.json").unlink(), "holds no sweep.json"),
        (lambda folder: [f.unlink() for f in folder.glob("*/results.json")], "so there is nothing to report"),
        (
            lambda folder: next((folder / "unmerged" / "answers").iterdir()).write_text('{"doc_id": 0}\n'),
            "answered 60 questions and unmerged 1, not the same ones",
        ),
    ],
)
def test_a_folder_without_complete_results_is_an_error_and_nothing_is_written(sweep, spoil, message, capsys):
    folder, _ = sweep
    spoil(folder)
    assert main([f"input={folder}"]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "report").exists()


def test_bad_words_are_errors(tmp_path, capsys):
    assert main([f"inptu={tmp_path}"]) == 2
    assert "did you mean 'input'?" in capsys.readouterr().err
    assert main([f"input={tmp_path}", "draws=3"]) == 2
    assert "draws='3' is not allowed" in capsys.readouterr().err


def test_file_names_are_short_and_differ_where_labels_do():
    assert file_name("pitome (paper), tokens 20 in the tower") == "pitome-paper-tokens-20-in-the-tower"
    long = "x" * 140 + " and more of it " * 20
    names = {file_name(long), file_name(long + "1"), file_name(long + "2")}
    assert len(names) == 3 and all(len(name) < 200 for name in names)
