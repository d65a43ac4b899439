"""The embedded scenes, questions and data set; the trained model's own accuracy is in test_eval.py."""

import numpy as np
import pytest

from llava_pitome import embedded
from llava_pitome.embedded import dataset
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.render import coverage, render
from llava_pitome.embedded.scenes import GAP, SIDE, scene

SEEDS = range(150)


def test_a_seed_always_gives_the_same_scene_picture_and_questions():
    for seed in (0, 7, 10**9):
        assert scene(seed) == scene(seed)
        assert np.array_equal(render(scene(seed)), render(scene(seed)))
        assert ask(scene(seed), 5) == ask(scene(seed), 5)


def test_different_seeds_give_different_pictures():
    assert len({render(scene(seed)).tobytes() for seed in SEEDS}) == len(SEEDS)


def test_objects_lie_inside_the_picture_and_do_not_touch():
    for seed in SEEDS:
        things = scene(seed).things
        for i, a in enumerate(things):
            assert a.x - a.across // 2 >= 0 and a.x + a.across // 2 < SIDE
            for b in things[i + 1 :]:
                apart = max(abs(a.x - b.x), abs(a.y - b.y))
                assert apart >= a.across // 2 + b.across // 2 + GAP


def test_small_objects_cover_few_patches_and_every_scene_has_one():
    for seed in SEEDS:
        small = [t for t in scene(seed).things if t.size == "small"]
        assert small
        assert all(coverage(t).sum() <= 4 for t in small)  # patches


def test_there_is_no_answer_that_the_question_gives_away():
    """The best constant answer to each question type is right at most half of the time."""
    asked = [q for seed in SEEDS for q in ask(scene(seed), 6)]
    kinds = {q.question_type for q in asked}
    best = 0
    for kind in kinds:
        answers = [q.answer for q in asked if q.question_type == kind]
        best += max(answers.count(a) for a in set(answers))
    assert best / len(asked) <= 0.5


def test_all_three_answer_types_are_asked():
    asked = [q.answer_type for seed in SEEDS for q in ask(scene(seed), 6)]
    assert all(asked.count(kind) > len(asked) / 10 for kind in ("yes/no", "number", "other"))


@pytest.mark.parametrize("seed", range(40))
def test_answers_agree_with_the_scene(seed):
    """Checked by a second reading of the scene for the kinds that can be parsed from their words."""
    seen = scene(seed)
    for q in ask(seen, 12):
        words = q.text.rstrip("?").split()
        if q.text == "How many objects are there?":
            assert q.answer == str(len(seen.things))
        elif q.text.startswith("Is there"):
            wanted = set(words[3:]) - {"object"}
            assert q.answer == ("yes" if any(wanted <= set(vars(t).values()) for t in seen.things) else "no")
        elif q.text.startswith("Are there more"):
            counts = [sum(w.startswith(t.shape) for t in seen.things) for w in (words[3], words[5])]
            assert q.answer == ("yes" if counts[0] > counts[1] else "no")
        elif q.text.startswith("How many") and words[3] == "objects":
            assert q.answer == str(sum(t.color == words[2] for t in seen.things))
        elif q.text.startswith(("What digit", "What letter")):
            assert q.answer in {t.mark for t in seen.things}
        elif q.text.startswith("What color is the"):
            assert q.answer in {t.color for t in seen.things}


def test_the_data_set_is_written_in_vqav2s_form(tmp_path):
    import datasets

    path = dataset.write(tmp_path, pictures=4, each=3)
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert set(rows.column_names) == {
        "question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id",
        "question", "image",
    }  # fmt: skip
    assert len(rows) == 12 and len(set(rows["question_id"])) == 12
    first = rows[0]
    assert len(first["answers"]) == 10 and {a["answer"] for a in first["answers"]} == {
        first["multiple_choice_answer"]
    }
    assert np.array_equal(np.asarray(first["image"]), render(scene(0)))


def test_the_validation_split_is_large_enough_and_apart_from_training():
    assert dataset.PICTURES * dataset.EACH >= 3000
    assert (
        dataset.PICTURES < 900_000_000
    )  # where held-out and training seeds begin, see train/embedded/data.py


def test_the_weights_are_small_enough_for_git():
    assert (embedded.PATH / "model.safetensors").stat().st_size <= 8 * 2**20
