"""Faster ways to compute what plain PyTorch says elsewhere; each is tested against it."""
