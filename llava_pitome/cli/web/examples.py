"""Pictures and questions to pick from: embedded scenes."""

from pathlib import Path

from PIL import Image

from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene

SEEDS = (8, 13, 6, 26, 30, 4)


def write(folder: Path) -> list[tuple[Path, str]]:
    """Writes the scenes as PNG files and gives them back, each with a question about it."""
    found = []
    for seed in SEEDS:
        path = folder / f"scene-{seed}.png"
        Image.fromarray(render(scene(seed))).save(path)
        found.append((path, ask(scene(seed), 1)[0].text))
    return found
