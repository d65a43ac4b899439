"""Merging methods, one paper a file; importing this package registers them.

A method is a pure function on tensors that never sees a model. To add one, write its file and import it here.
"""

from llava_pitome.methods import (  # noqa: F401, I001 (help texts and tables list methods in this order)
    pitome, tome, random, tofu, dct, diffrate, grid, fastv, visionzip, prumerge, divprune, sparsevlm,
)  # fmt: skip
from llava_pitome.methods.registry import METHOD_INPUTS, METHODS, PLACES, Method, parameter, register_method

__all__ = ["METHODS", "METHOD_INPUTS", "PLACES", "Method", "parameter", "register_method"]
