"""Writes the embedded questions in VQAv2's published form: parquet with images and ten answers per question.

lmms-eval's own `vqav2_val` task and metric run on it unmodified.
"""

import io
import os
from pathlib import Path

from llava_pitome.embedded import render, scenes
from llava_pitome.embedded.questions import ask

PICTURES, EACH = 1024, 3  # validation images, and questions about each
VERSION = "cbb7bcb2"  # to be changed with the images or questions; a test compares their checksum
FILE = "data/validation-00000-of-00001.parquet"


def write(folder: Path, pictures: int = PICTURES, each: int = EACH, first_seed: int = 0) -> Path:
    """Writes the validation split below `folder` and returns its file; an existing one is kept.

    The seeds of training scenes start at 900,000,000, those of validation at 0.
    """
    import datasets

    path = folder / FILE
    if path.exists():
        return path
    rows = [row for seed in range(first_seed, first_seed + pictures) for row in _rows(seed, each)]
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


def _rows(seed: int, each: int) -> list[dict]:
    """The rows of one image."""
    from PIL import Image

    scene = scenes.scene(seed)
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
