"""Evaluation: python -m eval.run and its siblings."""
