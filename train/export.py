"""Writes embedded scenes in LLaVA's format: python -m train.export [model=NAME] [scenes=N] [output=FOLDER].

Images are written to output/images, conversations about them to output/conversations.json. Validation has the
seeds from 0 on; those for training begin at 900,000,000.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_pitome.cli.options import Option, folder, helped, one_of, parse, whole
from llava_pitome.embedded import NAME
from llava_pitome.embedded.dataset import SCENES
from llava_pitome.embedded.questions import HINT, Question
from llava_pitome.embedded.render import render

FIRST_SEED = 1_900_000_000  # the embedded model was not trained on these
TURNS = 10
COUNT = (whole(1), "a whole number from 1")
OPTIONS = {
    "model": Option(NAME, one_of(*SCENES), " | ".join(SCENES), "the embedded model whose scenes they are"),
    "scenes": Option(4096, *COUNT, "images"),
    "first_seed": Option(FIRST_SEED, whole(900_000_000), "a whole number from 900000000", "of the images"),
    "turns": Option(TURNS, *COUNT, "questions about each image"),
    "output": Option(
        "output/embedded_conversations", folder, "a folder, not a file", "where they are written"
    ),
}


def main(words: Sequence[str]) -> int:
    """Writes them; returns the command's exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(write(Path(options.pop("output")), **options))
    return 0


def write(
    path: Path, scenes: int, first_seed: int = FIRST_SEED, turns: int = TURNS, model: str = NAME
) -> Path:
    """Writes images and conversations; returns the file of the latter, which is written last."""
    from PIL import Image

    scene, ask = SCENES[model]

    (path / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(first_seed, first_seed + scenes):
        content = scene(seed)
        name = f"images/{seed}.png"
        Image.fromarray(render(content)).save(path / name)
        rows.append({"id": str(seed), "image": name, "conversations": _conversation(ask(content, turns))})
    file, partial = path / "conversations.json", path / "conversations.part"
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(file)
    return file


def _conversation(questions: Sequence[Question]) -> list[dict[str, str]]:
    """Questions and answers about a scene; the first turn has its image and how to answer."""
    conversation = []
    for i, question in enumerate(questions):
        text = f"<image>\n{question.text}{HINT}" if i == 0 else question.text
        conversation += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return conversation


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
