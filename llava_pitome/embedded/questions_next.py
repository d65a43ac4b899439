"""Questions about the scenes of `embedded-next`: those of `questions`, and about words, characters and cells.

About two in five need what only the tiles resolve.
"""

from collections.abc import Iterator

import numpy as np

from llava_pitome.embedded import questions
from llava_pitome.embedded.questions import CLEAR, Kinds, Question
from llava_pitome.embedded.scenes import Scene, Thing
from llava_pitome.embedded.scenes_next import SIGN, WORDS

ROWS, COLUMNS = "ABC", "123"  # names of the cells of a 3 x 3 grid, from the top left
ABSENT = 4  # words that are not in the picture and that questions mention, per scene


def ask(scene: Scene, count: int, salt: int = 0) -> list[Question]:
    """`count` different questions about a scene, determined by its seed and `salt`.

    About 32 % yes/no, 11 % number, 57 % other, as far as the scene allows these kinds.
    """
    return questions.ask(scene, count, salt, KINDS)


def cell(thing: Thing, scene: Scene) -> str | None:
    """The cell of a 3 x 3 grid that an object's centre is in, such as "B2"; None near the grid's lines."""
    names = ""
    for name, at, side in ((ROWS, thing.y, scene.height), (COLUMNS, thing.x, scene.width)):
        if min(abs(at - side * line / 3) for line in (1, 2)) < CLEAR / 2 * scene.scale:
            return None
        names += name[int(3 * at / side)]
    return names


def _signs(scene: Scene) -> list[Thing]:
    return [t for t in scene.things if t.shape == SIGN]


def _word(scene: Scene) -> Iterator[Question]:
    for sign in _signs(scene):
        for name in questions._names(sign, scene):
            yield Question(f"What word is on the {name}?", sign.mark, "other", "what word is on the")


def _word_exists(scene: Scene) -> Iterator[Question]:
    words = [sign.mark for sign in _signs(scene)]
    absent = [w for w in WORDS if w not in words]
    others = np.random.default_rng([scene.seed, 4]).choice(absent, ABSENT, replace=False)
    for word in (*words, *map(str, others)):
        answer = "yes" if word in words else "no"
        yield Question(f"Is there a sign that says {word}?", answer, "yes/no", "is there a")


def _word_color(scene: Scene) -> Iterator[Question]:
    for sign in _signs(scene):
        text = f"What color is the sign that says {sign.mark}?"
        yield Question(text, sign.color, "other", "what color is the")


def _mark_color(scene: Scene) -> Iterator[Question]:
    marks = [t.mark for t in scene.things if len(t.mark) == 1]
    for thing in scene.things:
        if len(thing.mark) == 1 and marks.count(thing.mark) == 1:
            noun = "digit" if thing.mark.isdigit() else "letter"
            text = f"What color is the object with the {noun} {thing.mark}?"
            yield Question(text, thing.color, "other", "what color is the")


def _cell(scene: Scene) -> Iterator[Question]:
    for thing in scene.things:
        place = cell(thing, scene)
        for name in questions._names(thing, scene) if place else ():
            text = f"Which cell of the 3 by 3 grid is the {name} in?"
            yield Question(text, place, "other", "which")


def _word_cell(scene: Scene) -> Iterator[Question]:
    for sign in _signs(scene):
        place = cell(sign, scene)
        if place:
            text = f"Which cell of the 3 by 3 grid is the word {sign.mark} in?"
            yield Question(text, place, "other", "which")


KINDS: Kinds = {  # weights of the kinds in `questions` are lower than there, their proportions alike
    **{kind: (questions.KINDS[kind][0], weight) for kind, weight in {
        "exists": 0.18, "exists both": 0.05, "more": 0.03, "count all": 0.02, "count some": 0.09,
        "color": 0.08, "shape": 0.05, "where": 0.05, "neighbour": 0.02, "read": 0.16,
    }.items()},
    "word": (_word, 0.14),
    "word exists": (_word_exists, 0.06),
    "word color": (_word_color, 0.05),
    "mark color": (_mark_color, 0.02),
    "cell": (_cell, 0.06),
    "word cell": (_word_cell, 0.02),
}  # fmt: skip
