"""The embedded scenes, questions and data set; the trained model's own accuracy is in test_eval.py."""

import hashlib

import numpy as np
import pytest

from llava_pitome import embedded
from llava_pitome.embedded import dataset
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.render import coverage, render
from llava_pitome.embedded.scenes import GAP, SIDE, scene

SEEDS = range(150)
CHECKSUMS = {"cbb7bcb2": "d972082b7e16e50e"}  # of 32 scenes' images and questions, by version


def test_a_seed_determines_scene_image_and_questions():
    for seed in (0, 7, 10**9):
        assert scene(seed) == scene(seed)
        assert np.array_equal(render(scene(seed)), render(scene(seed)))
        assert ask(scene(seed), 5) == ask(scene(seed), 5)


def test_images_and_questions_are_those_of_the_version():
    digest = hashlib.sha256()
    for seed in range(32):
        digest.update(render(scene(seed)).tobytes() + repr(ask(scene(seed), dataset.EACH)).encode())
    assert digest.hexdigest()[:16] == CHECKSUMS[dataset.VERSION]


def test_different_seeds_give_different_images():
    assert len({render(scene(seed)).tobytes() for seed in SEEDS}) == len(SEEDS)


def test_objects_are_inside_the_image_and_do_not_touch():
    for seed in SEEDS:
        things = scene(seed).things
        for i, a in enumerate(things):
            assert a.x - a.across // 2 >= 0 and a.x + a.across // 2 < SIDE
            for b in things[i + 1 :]:
                distance = max(abs(a.x - b.x), abs(a.y - b.y))
                assert distance >= a.across // 2 + b.across // 2 + GAP


def test_every_scene_has_a_small_object_and_these_cover_few_patches():
    for seed in SEEDS:
        small = [t for t in scene(seed).things if t.size == "small"]
        assert small
        assert all(coverage(t).sum() <= 4 for t in small)  # patches


def test_no_question_reveals_its_answer():
    """The best constant answer to each question type is right at most half of the time."""
    questions = [q for seed in SEEDS for q in ask(scene(seed), 6)]
    right = 0
    for kind in {q.question_type for q in questions}:
        answers = [q.answer for q in questions if q.question_type == kind]
        right += max(answers.count(a) for a in set(answers))
    assert right / len(questions) <= 0.5


def test_there_are_questions_of_all_three_answer_types():
    kinds = [q.answer_type for seed in SEEDS for q in ask(scene(seed), 6)]
    assert all(kinds.count(kind) > len(kinds) / 10 for kind in ("yes/no", "number", "other"))


@pytest.mark.parametrize("seed", range(40))
def test_answers_agree_with_the_scene(seed):
    """An independent reading of the scene, for the kinds that can be parsed from their words."""
    things = scene(seed).things
    for q in ask(scene(seed), 12):
        words = q.text.rstrip("?").split()
        if q.text == "How many objects are there?":
            assert q.answer == str(len(things))
        elif q.text.startswith("Is there"):
            wanted = set(words[3:]) - {"object"}
            assert q.answer == ("yes" if any(wanted <= set(vars(t).values()) for t in things) else "no")
        elif q.text.startswith("Are there more"):
            counts = [sum(w.startswith(t.shape) for t in things) for w in (words[3], words[5])]
            assert q.answer == ("yes" if counts[0] > counts[1] else "no")
        elif q.text.startswith("How many") and words[3] == "objects":
            assert q.answer == str(sum(t.color == words[2] for t in things))
        elif q.text.startswith(("What digit", "What letter")):
            assert q.answer in {t.mark for t in things}
        elif q.text.startswith("What color is the"):
            assert q.answer in {t.color for t in things}


def test_the_data_set_has_vqav2s_form(tmp_path):
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
    assert [a["answer"] for a in first["answers"]] == [first["multiple_choice_answer"]] * 10
    assert np.array_equal(np.asarray(first["image"]), render(scene(0)))


def test_the_validation_split_is_large_and_disjoint_from_training():
    assert dataset.PICTURES * dataset.EACH >= 3000
    assert dataset.PICTURES < 900_000_000  # the first training seed, see train/embedded/data.py


def test_the_weights_are_small_enough_for_git():
    assert (embedded.PATH / "model.safetensors").stat().st_size <= 8 * 2**20
