"""The scenes, questions and data set of embedded-next; how it is trained is in test_train_next.py."""

import hashlib
import re

import numpy as np
import pytest
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from llava_pitome import embedded
from llava_pitome.embedded import dataset, glyphs
from llava_pitome.embedded.anyres import PINPOINTS, best_resolution, tiling
from llava_pitome.embedded.questions_next import ask, cell
from llava_pitome.embedded.render import coverage_of_cells, render
from llava_pitome.embedded.scenes import DIGITS, GAP, LETTERS
from llava_pitome.embedded.scenes_next import SIGN, WORDS, half_extent, scene

SEEDS = range(150)
CHECKSUMS = {"a82afa44": "a82afa44cd1a80a5"}  # of 32 scenes' images and questions, by version
NEEDS_TILES = re.compile(r"word|says|digit|letter")
NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"}


def test_a_seed_determines_scene_image_and_questions():
    for seed in (0, 7, 5 * 10**9):
        assert scene(seed) == scene(seed)
        assert np.array_equal(render(scene(seed)), render(scene(seed)))
        assert ask(scene(seed), 5) == ask(scene(seed), 5)


def test_images_and_questions_are_those_of_the_version():
    digest = hashlib.sha256()
    for seed in range(32):
        digest.update(render(scene(seed)).tobytes() + repr(ask(scene(seed), dataset.EACH)).encode())
    assert digest.hexdigest()[:16] == CHECKSUMS[dataset.VERSIONS[embedded.NAME_NEXT]]


def test_pictures_have_many_sizes_and_aspects_and_use_every_pinpoint():
    sizes = {(s.height, s.width) for s in map(scene, SEEDS)}
    assert len(sizes) > 100
    assert all(112 <= side <= 336 for size in sizes for side in size)
    aspects = [width / height for height, width in sizes]
    assert min(aspects) < 0.5 and max(aspects) > 2 and any(0.9 < a < 1.1 for a in aspects)
    assert {best_resolution(*size) for size in sizes} == set(PINPOINTS)
    assert all(render(s).shape == (s.height, s.width, 3) for s in map(scene, range(10)))


def test_a_size_can_be_given():
    assert render(scene(3, (130, 300))).shape == (130, 300, 3)


def test_three_to_twelve_objects_are_inside_the_picture_and_do_not_touch():
    for seed in SEEDS:
        found = scene(seed)
        assert 3 <= len(found.things) <= 12
        for i, a in enumerate(found.things):
            half_y, half_x = half_extent(a)
            assert half_y <= a.y < found.height - half_y and half_x <= a.x < found.width - half_x
            for b in found.things[i + 1 :]:
                other_y, other_x = half_extent(b)
                gaps = (abs(a.y - b.y) - half_y - other_y, abs(a.x - b.x) - half_x - other_x)
                assert max(gaps) >= GAP


def test_no_tile_border_cuts_an_object_with_text():
    for found in map(scene, SEEDS):
        tiles = tiling(found.height, found.width)
        for thing in (t for t in found.things if t.mark):
            for axis, at in enumerate((thing.y, thing.x)):
                assert (abs(tiles.tile_borders(axis) - at) > half_extent(thing)[axis]).all()


def test_strokes_are_a_pixel_wide_in_the_tiles_and_less_in_the_thumbnail():
    for found in map(scene, SEEDS):
        tiles = tiling(found.height, found.width)
        thumbnail = [112 / side for side in tiles.size]
        for thing in (t for t in found.things if t.mark):
            assert thing.stroke * tiles.scale > 0.99
            assert thing.stroke * min(thumbnail) <= 0.65


def test_words_are_short_distinct_and_survive_vqas_normalization():
    assert len(set(WORDS)) == len(WORDS) == 48
    assert all(3 <= len(word) <= 5 and word.isalpha() and word.islower() for word in WORDS)
    assert not set(WORDS) & {"a", "an", "the", "none"} | set(WORDS) & NUMBERS
    assert len({glyphs.dots(c).tobytes() for c in glyphs.GLYPHS}) == len(glyphs.GLYPHS) == 35


def test_text_is_drawn_at_any_scale_with_the_same_ink():
    exact = glyphs.draw("CAT", 1.0)
    assert np.array_equal(exact, glyphs.dots("CAT"))
    for scale in (1.0, 1.2, 1.5, 2.0, 3.3):
        drawn = glyphs.draw("CAT", scale)
        assert drawn.shape == glyphs.extent("CAT", scale)
        assert drawn.sum() == pytest.approx(exact.sum() * scale**2)


def test_resolutions_are_those_of_transformers():
    pinpoints = [list(p) for p in PINPOINTS]
    for height in range(112, 337, 7):
        for width in range(112, 337, 3):
            assert best_resolution(height, width) == tuple(select_best_resolution((height, width), pinpoints))


def test_coverage_of_cells_adds_up_to_an_objects_area():
    found = scene(2)
    for thing in found.things:
        fine = coverage_of_cells(
            thing, found.height, found.width, *map(np.arange, (found.height + 1, found.width + 1))
        )
        rows, columns = np.linspace(0, found.height, 8), np.linspace(0, found.width, 5)
        coarse = coverage_of_cells(thing, found.height, found.width, rows, columns)
        assert coarse.shape == (7, 4)
        assert (coarse * np.diff(rows)[:, None] * np.diff(columns)).sum() == pytest.approx(fine.sum())


def test_no_question_reveals_its_answer():
    """The best constant answer to each question type is right at most half of the time."""
    questions = [q for seed in SEEDS for q in ask(scene(seed), 6)]
    right = 0
    for kind in {q.question_type for q in questions}:
        answers = [q.answer for q in questions if q.question_type == kind]
        right += max(answers.count(a) for a in set(answers))
    assert right / len(questions) <= 0.4


def test_about_two_in_five_questions_need_the_tiles():
    questions = [q for seed in SEEDS for q in ask(scene(seed), 3)]
    assert 0.33 < sum(bool(NEEDS_TILES.search(q.text)) for q in questions) / len(questions) < 0.45


@pytest.mark.parametrize("seed", range(40))
def test_answers_agree_with_the_scene(seed):
    """An independent reading of the scene, for the kinds that can be parsed from their words."""
    found = scene(seed)
    things, marks = found.things, {t.mark for t in found.things}
    for q in ask(found, 16):
        words = q.text.rstrip("?").split()
        if "says" in words or "word" in words:
            signs = [
                t for t in things if t.shape == SIGN and t.mark == words[-2 if words[-1] == "in" else -1]
            ]
        if q.text.startswith("Is there a sign that says"):
            assert q.answer == ("yes" if words[-1] in marks else "no")
        elif q.text.startswith("Is there"):
            wanted = set(words[3:]) - {"object"}
            assert q.answer == ("yes" if any(wanted <= set(vars(t).values()) for t in things) else "no")
        elif q.text.startswith("What word"):
            assert q.answer in marks and q.answer in WORDS
        elif q.text.startswith(("What digit", "What letter")):
            assert q.answer in marks and q.answer in (DIGITS if words[1] == "digit" else LETTERS)
        elif q.text.startswith("What color is the sign that says"):
            assert [t.color for t in signs] == [q.answer]
        elif q.text.startswith("What color is the object with the"):
            assert [t.color for t in things if t.mark == words[-1]] == [q.answer]
        elif "is the word" in q.text:
            assert [cell(t, found) for t in signs] == [q.answer]
        elif q.text == "How many objects are there?":
            assert q.answer == str(len(things))


def test_cells_are_thirds_of_the_picture():
    found = [(t, s) for s in map(scene, SEEDS) for t in s.things]
    named = {cell(t, s) for t, s in found} - {None}
    assert named == {row + column for row in "ABC" for column in "123"}
    for thing, picture in found:
        name = cell(thing, picture)
        if name:
            row, column = "ABC".index(name[0]), "123".index(name[1])
            assert picture.height * row < 3 * thing.y < picture.height * (row + 1)
            assert picture.width * column < 3 * thing.x < picture.width * (column + 1)


def test_the_data_set_has_vqav2s_form_and_true_sizes(tmp_path):
    import datasets

    path = dataset.write(tmp_path, pictures=4, each=3, model=embedded.NAME_NEXT)
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    reference = dataset.write(tmp_path / "old", pictures=1, each=1)
    assert rows.features == datasets.Dataset.from_parquet(str(reference)).features
    assert len(rows) == 12 and len(set(rows["question_id"])) == 12
    for seed in range(4):
        assert np.array_equal(np.asarray(rows[3 * seed]["image"]), render(scene(seed)))
    first = rows[0]
    assert [a["answer"] for a in first["answers"]] == [first["multiple_choice_answer"]] * 10


def test_only_embedded_models_have_a_data_set(tmp_path):
    with pytest.raises(
        ValueError, match="'embedded-nxt' is not embedded; allowed are embedded, embedded-next"
    ):
        dataset.write(tmp_path, model="embedded-nxt")


def test_an_image_reduced_to_its_thumbnail_keeps_its_size_and_loses_its_words():
    from llava_pitome.image_io import with_detail_of

    image = Image.fromarray(render(scene(0)))
    reduced = with_detail_of(image, 112)
    assert reduced.size == image.size
    again = with_detail_of(reduced, 112)
    difference = [
        np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()
        for a, b in ((image, reduced), (reduced, again))
    ]
    assert difference[0] > 3 * difference[1]
