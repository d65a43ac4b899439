"""Merges as data: tensors in, tensors out."""
