"""A small trained LLaVA, and a generator of images and questions for it: no network is needed."""

from pathlib import Path

NAME = "embedded"  # accepted instead of a path
PATH = Path(__file__).parent / "model"
