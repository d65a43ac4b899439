"""Writes the embedded questions in VQAv2's published form: parquet with images and ten answers per question.

lmms-eval's own `vqav2_val` task and metric run on it unmodified.
"""

import io
import os
from pathlib import Path

from llava_pitome.embedded import NAME, NAME_NEXT, questions, questions_next, render, scenes, scenes_next

PICTURES, EACH = 1024, 3  # validation images, and questions about each
VERSIONS = {NAME: "cbb7bcb2", NAME_NEXT: "a82afa44"}  # change with images or questions; tests have checksums
VERSION = VERSIONS[NAME]
SCENES = {NAME: (scenes.scene, questions.ask), NAME_NEXT: (scenes_next.scene, questions_next.ask)}
FILE = "data/validation-00000-of-00001.parquet"


def write(
    folder: Path, pictures: int = PICTURES, each: int = EACH, first_seed: int = 0, model: str = NAME
) -> Path:
    """Writes the validation split below `folder` and returns its file; an existing one is kept.

    The seeds of training scenes start at 900,000,000, those of validation at 0.

    Args:
        folder: of the data set.
        pictures: number of images.
        each: questions about each.
        first_seed: of the scenes.
        model: the embedded model that the scenes and questions are for, a key of SCENES.

    Raises:
        ValueError: there is no such model.
    """
    if model not in SCENES:
        raise ValueError(f"model={model!r} is not embedded; allowed are {', '.join(SCENES)}")
    import datasets

    path = folder / FILE
    if path.exists():
        return path
    rows = [row for seed in range(first_seed, first_seed + pictures) for row in _rows(seed, each, model)]
    answer = {"answer": datasets.Value("string"), "answer_confidence": datasets.Value("string")}
    answer["answer_id"] = datasets.Value("int64")
    features = datasets.Features(
        {
            "question_type": datasets.Value("string"),
            "multiple_choice_answer": datasets.Value("string"),
            "answers": datasets.List(answer),
            "image_id": datasets.Value("int64"),
            "answer_type": datasets.Value("string"),
            "question_id": datasets.Value("int64"),
            "question": datasets.Value("string"),
            "image": datasets.Image(),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    datasets.Dataset.from_list(rows, features=features).to_parquet(partial)
    partial.replace(path)
    return path


def _rows(seed: int, each: int, model: str) -> list[dict]:
    """The rows of one image."""
    from PIL import Image

    make_scene, ask = SCENES[model]
    scene = make_scene(seed)
    png = io.BytesIO()
    Image.fromarray(render.render(scene)).save(png, "PNG")
    return [
        {
            "question_type": question.question_type,
            "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)
            ],
            "image_id": seed,
            "answer_type": question.answer_type,
            "question_id": seed * 1000 + number,
            "question": question.text,
            "image": {"bytes": png.getvalue(), "path": f"{seed}.png"},
        }
        for number, question in enumerate(ask(scene, each))
    ]
