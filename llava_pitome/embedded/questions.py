"""Questions about a scene, in VQAv2's three answer types.

Every kind chooses its answer first, uniformly among the answers that the scene allows, then a question with
that answer, so that a model without the image gains little from knowing the question.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llava_pitome.embedded.scenes import COLORS, DIGITS, SHAPES, TEXTURES, Scene, Thing

HINT = "\nAnswer the question using a single word or phrase."  # after a question, as in LLaVA's training data
CLEAR = 8  # least pixels between two centres of which one is left of the other
SIDES: dict[str, Callable[[Thing, Thing], int]] = {  # distance of a from b to that side, in pixels
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


@dataclass(frozen=True)
class Question:
    """A question, its answer, and VQAv2's answer type and question type (the first words)."""

    text: str
    answer: str
    answer_type: str
    question_type: str


Kinds = dict[str, tuple[Callable[[Scene], Iterator[Question]], float]]


def ask(scene: Scene, count: int, salt: int = 0, kinds: Kinds | None = None) -> list[Question]:
    """`count` different questions about a scene, determined by its seed and `salt`.

    About 39 % yes/no, 22 % number, 39 % other, as far as the scene allows these kinds.

    Args:
        scene: what is asked about.
        count: of questions; fewer where the scene allows no more.
        salt: changes the questions.
        kinds: the functions that write questions, and their weights; `KINDS` by default.
    """
    rng = np.random.default_rng([scene.seed, 2, salt])
    chosen: dict[str, Question] = {}
    kinds = KINDS if kinds is None else kinds
    names, weights = tuple(kinds), np.array([w for _, w in kinds.values()])
    found: dict[str, list[Question]] = {}  # by kind
    for _ in range(20 * count):
        if len(chosen) == count:
            break
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        if kind not in found:
            found[kind] = list(kinds[kind][0](scene))
        options = found[kind]
        if options:
            answers = sorted({o.answer for o in options})
            answer = answers[int(rng.integers(len(answers)))]
            options = [o for o in options if o.answer == answer]
            question = options[int(rng.integers(len(options)))]
            chosen.setdefault(question.text, question)
    return list(chosen.values())


def _names(thing: Thing, scene: Scene, hide: str = "") -> list[str]:
    """The shortest unique names of an object that do not reveal the attribute `hide`."""
    found: list[str] = []
    for used in ((), ("color",), ("size",), ("texture",), ("size", "color"), ("size", "texture")):
        for noun in ("shape", "object"):
            if hide in used or hide == noun or (noun == "object" and used == ("size",)):
                continue
            if "texture" in used and thing.texture == "plain":
                continue
            keys = (*used, "shape") if noun == "shape" else used
            if not keys:
                continue
            if sum(all(getattr(t, k) == getattr(thing, k) for k in keys) for t in scene.things) == 1:
                found.append(
                    " ".join([*(getattr(thing, k) for k in used), thing.shape if noun == "shape" else noun])
                )
        if len(found) >= 2:
            break
    return found


def _exists(scene: Scene) -> Iterator[Question]:
    for noun in (*SHAPES, *(f"{word} object" for word in (*COLORS, *TEXTURES[1:]))):
        word = noun.split()[0]
        exists = any(word in (t.shape, t.color, t.texture) for t in scene.things)
        yield _existence(noun, exists)


def _exists_both(scene: Scene) -> Iterator[Question]:
    """Where the answer is "no", colour and shape are those of two different objects."""
    for color in sorted({t.color for t in scene.things}):
        for shape in sorted({t.shape for t in scene.things}):
            yield _existence(
                f"{color} {shape}", any((t.color, t.shape) == (color, shape) for t in scene.things)
            )


def _existence(noun: str, exists: bool) -> Question:
    article = "an" if noun[0] in "aeiou" else "a"
    return Question(f"Is there {article} {noun}?", "yes" if exists else "no", "yes/no", "is there a")


def _more(scene: Scene) -> Iterator[Question]:
    counts = {shape: sum(t.shape == shape for t in scene.things) for shape in SHAPES}
    for a in SHAPES:
        for b in SHAPES:
            if counts[a] != counts[b]:
                text = f"Are there more {_plural(a)} than {_plural(b)}?"
                yield Question(text, "yes" if counts[a] > counts[b] else "no", "yes/no", "are there")


def _plural(shape: str) -> str:
    return {"cross": "crosses"}.get(shape, shape + "s")


def _count_all(scene: Scene) -> Iterator[Question]:
    yield Question("How many objects are there?", str(len(scene.things)), "number", "how many")


def _count_some(scene: Scene) -> Iterator[Question]:
    for shape in SHAPES:
        total = sum(t.shape == shape for t in scene.things)
        yield Question(f"How many {_plural(shape)} are there?", str(total), "number", "how many")
    for color in COLORS:
        total = sum(t.color == color for t in scene.things)
        yield Question(f"How many {color} objects are there?", str(total), "number", "how many")


def _what(attribute: str) -> Callable[[Scene], Iterator[Question]]:
    def questions(scene: Scene) -> Iterator[Question]:
        for thing in scene.things:
            for name in _names(thing, scene, hide=attribute):
                opening = f"What {attribute} is the"
                yield Question(f"{opening} {name}?", getattr(thing, attribute), "other", opening.lower())

    return questions


def _where(scene: Scene) -> Iterator[Question]:
    x, y = scene.width / 2, scene.height / 2
    for thing in scene.things:
        if min(abs(thing.x - x), abs(thing.y - y)) >= CLEAR * scene.scale:
            answer = ("top" if thing.y < y else "bottom") + (" left" if thing.x < x else " right")
            for name in _names(thing, scene):
                yield Question(f"Where is the {name}?", answer, "other", "where is the")


def _neighbour(scene: Scene) -> Iterator[Question]:
    """What is left of the red circle? Only where exactly one object is, and no other one is nearly so."""
    for b in scene.things:
        for side, distance in SIDES.items():
            others = [t for t in scene.things if t is not b]
            clear = CLEAR * scene.scale
            beside = [t for t in others if distance(t, b) > -clear]
            if len(beside) == 1 and distance(beside[0], b) >= clear:
                for name in _names(b, scene):
                    yield Question(
                        f"What shape is {side} the {name}?", beside[0].shape, "other", "what shape is"
                    )
                    yield Question(
                        f"What color is {side} the {name}?", beside[0].color, "other", "what color is"
                    )


def _read(scene: Scene) -> Iterator[Question]:
    for thing in scene.things:
        if len(thing.mark) == 1:
            noun = "digit" if thing.mark in DIGITS else "letter"
            for name in _names(thing, scene):
                yield Question(
                    f"What {noun} is on the {name}?", thing.mark, "other", f"what {noun} is on the"
                )


KINDS: Kinds = {
    "exists": (_exists, 0.28),
    "exists both": (_exists_both, 0.06),
    "more": (_more, 0.05),
    "count all": (_count_all, 0.05),
    "count some": (_count_some, 0.17),
    "color": (_what("color"), 0.10),
    "shape": (_what("shape"), 0.10),
    "where": (_where, 0.08),
    "neighbour": (_neighbour, 0.03),
    "read": (_read, 0.08),
}
