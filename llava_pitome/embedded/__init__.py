"""Two small trained LLaVAs, and generators of images and questions for them: no network is needed."""

from pathlib import Path

NAME = "embedded"  # accepted instead of a path
PATH = Path(__file__).parent / "model"
NAME_NEXT = "embedded-next"  # a LLaVA-NeXT
PATH_NEXT = Path(__file__).parent / "model_next"
PATHS = {NAME: PATH, NAME_NEXT: PATH_NEXT}


def folder(name: str) -> str:
    """The folder of a model in this package, by its name.

    Raises:
        ValueError: its weights are not there.
    """
    if not (PATHS[name] / "config.json").exists():
        raise ValueError(
            f"{name} is not in this checkout: train it with `python -m train.embedded model=next`, and copy "
            f"output/{name} to {PATHS[name]}"
        )
    return str(PATHS[name])
