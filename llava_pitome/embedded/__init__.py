"""A small trained LLaVA, and the pictures and questions it answers: all without a network."""

from pathlib import Path

NAME = "embedded"  # what it is called wherever a path is asked for
PATH = Path(__file__).parent / "model"
