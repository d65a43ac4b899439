"""Questions about a scene, in VQAv2's three answer types.

Every kind picks its answer before its question, evenly among the answers that the scene allows, so that a
model that sees no picture gains little from knowing the question.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llava_pitome.embedded.scenes import COLORS, DIGITS, SHAPES, SIDE, Scene, Thing

CLEAR = 8  # pixels by which two centres must differ before one is called left of the other
SIDES: dict[str, Callable[[Thing, Thing], int]] = {  # how far a lies on that side of b, in pixels
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}


@dataclass(frozen=True)
class Question:
    """A question, its answer, VQAv2's answer type and question type (the opening words)."""

    text: str
    answer: str
    answer_type: str
    question_type: str


def ask(scene: Scene, count: int, salt: int = 0) -> list[Question]:
    """`count` different questions about a scene, the same for the same seed and salt.

    About 38 % yes/no, 24 % number, 38 % other, as far as the scene lends itself to the kinds.
    """
    rng = np.random.default_rng([scene.seed, 2, salt])
    asked: dict[str, Question] = {}
    kinds, weights = tuple(KINDS), np.array([w for _, w in KINDS.values()])
    for _ in range(20 * count):
        if len(asked) == count:
            break
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        options = list(KINDS[kind][0](scene))
        if options:
            answers = sorted({o.answer for o in options})
            answer = answers[int(rng.integers(len(answers)))]
            options = [o for o in options if o.answer == answer]
            question = options[int(rng.integers(len(options)))]
            asked.setdefault(question.text, question)
    return list(asked.values())


def _names(thing: Thing, scene: Scene, hide: str = "") -> list[str]:
    """Ways to name one object and no other, without giving away the attribute `hide`; the shortest ones."""
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
    there = {(t.color, t.shape) for t in scene.things}
    for color in sorted({t.color for t in scene.things}):
        for shape in sorted({t.shape for t in scene.things}):  # a "no" mixes what two objects have
            article = "an" if color[0] in "aeiou" else "a"
            answer = "yes" if (color, shape) in there else "no"
            yield Question(f"Is there {article} {color} {shape}?", answer, "yes/no", "is there a")


def _side(scene: Scene) -> Iterator[Question]:
    for a in scene.things:
        for b in scene.things:
            for side, distance in SIDES.items():
                if a is not b and abs(distance(a, b)) >= CLEAR:
                    answer = "yes" if distance(a, b) > 0 else "no"
                    for first, second in zip(_names(a, scene), _names(b, scene)):
                        yield Question(f"Is the {first} {side} the {second}?", answer, "yes/no", "is the")


def _textured(scene: Scene) -> Iterator[Question]:
    for thing in scene.things:
        for name in () if thing.mark else _names(thing, scene, hide="texture"):
            for texture in ("striped", "checkered"):
                answer = "yes" if thing.texture == texture else "no"
                yield Question(f"Is the {name} {texture}?", answer, "yes/no", "is the")


def _count_all(scene: Scene) -> Iterator[Question]:
    yield Question("How many objects are there?", str(len(scene.things)), "number", "how many")


def _count_some(scene: Scene) -> Iterator[Question]:
    for shape in SHAPES:
        plural = {"cross": "crosses"}.get(shape, shape + "s")
        total = sum(t.shape == shape for t in scene.things)
        yield Question(f"How many {plural} are there?", str(total), "number", "how many")
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
    middle = SIDE / 2
    for thing in scene.things:
        if min(abs(thing.x - middle), abs(thing.y - middle)) >= CLEAR:
            answer = ("top" if thing.y < middle else "bottom") + (" left" if thing.x < middle else " right")
            for name in _names(thing, scene):
                yield Question(f"Where is the {name}?", answer, "other", "where is the")


def _neighbour(scene: Scene) -> Iterator[Question]:
    """What is left of the red circle? Asked where exactly one object is, and no other is near the line."""
    for b in scene.things:
        for side, distance in SIDES.items():
            others = [t for t in scene.things if t is not b]
            beside = [t for t in others if distance(t, b) > -CLEAR]
            if len(beside) == 1 and distance(beside[0], b) >= CLEAR:
                for name in _names(b, scene):
                    yield Question(
                        f"What shape is {side} the {name}?", beside[0].shape, "other", "what shape is"
                    )
                    yield Question(
                        f"What color is {side} the {name}?", beside[0].color, "other", "what color is"
                    )


def _read(scene: Scene) -> Iterator[Question]:
    for thing in scene.things:
        if thing.mark:
            noun = "digit" if thing.mark in DIGITS else "letter"
            for name in _names(thing, scene):
                yield Question(
                    f"What {noun} is on the {name}?", thing.mark, "other", f"what {noun} is on the"
                )


KINDS: dict[str, tuple[Callable[[Scene], Iterator[Question]], float]] = {
    "exists": (_exists, 0.14),
    "side": (_side, 0.14),
    "textured": (_textured, 0.10),
    "count all": (_count_all, 0.04),
    "count some": (_count_some, 0.20),
    "color": (_what("color"), 0.09),
    "shape": (_what("shape"), 0.09),
    "where": (_where, 0.08),
    "neighbour": (_neighbour, 0.06),
    "read": (_read, 0.12),
}
