"""Writes embedded scenes in LLaVA's format: python train/export.py [scenes=N] [first_seed=N] [output=FOLDER].

Pictures go to output/images, conversations about them to output/conversations.json. Validation asks about the
seeds from 0 on; those that training may see begin at 900,000,000.
"""

import json
import sys
from pathlib import Path

from llava_pitome.cli.options import Option, folder, parse, whole
from llava_pitome.embedded.questions import HINT, ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

SEEDS = 1_900_000_000  # the embedded model was not trained on these
TURNS = 10
OPTIONS = {
    "scenes": Option(4096, whole(1), "a whole number from 1", "pictures"),
    "first_seed": Option(SEEDS, whole(900_000_000), "a whole number from 900000000", "of the pictures"),
    "turns": Option(TURNS, whole(1), "a whole number from 1", "questions about each"),
    "output": Option("output/embedded_conversations", folder, "a folder, not a file", "where they go"),
}


def main(words: list[str]) -> int:
    """Writes them; returns the command's exit status."""
    try:
        options = parse(words, OPTIONS)
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    print(write(Path(options["output"]), options["scenes"], options["first_seed"], options["turns"]))
    return 0


def write(path: Path, scenes: int, first_seed: int = SEEDS, turns: int = TURNS) -> Path:
    """Writes pictures and conversations, and gives the file of the latter, which comes last."""
    from PIL import Image

    (path / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(first_seed, first_seed + scenes):
        seen = scene(seed)
        name = f"images/{seed}.png"
        Image.fromarray(render(seen)).save(path / name)
        rows.append({"id": str(seed), "image": name, "conversations": _said(seen, turns)})
    file, partial = path / "conversations.json", path / "conversations.part"
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(file)
    return file


def _said(seen, turns: int) -> list[dict[str, str]]:
    """Questions and answers about a scene, its picture and how to answer in the first turn."""
    said = []
    for i, question in enumerate(ask(seen, turns)):
        words = f"<image>\n{question.text}{HINT}" if i == 0 else question.text
        said += [{"from": "human", "value": words}, {"from": "gpt", "value": question.answer}]
    return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
