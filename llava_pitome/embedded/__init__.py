"""A small trained LLaVA, and the pictures and questions it answers: all without a network."""

from pathlib import Path

PATH = Path(__file__).parent / "model"
