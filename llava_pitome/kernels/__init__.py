"""Faster ways to compute what plain PyTorch says elsewhere; each is tested against it."""

import importlib.util
import os

import torch
from torch import Tensor


def triton_is_there() -> bool:
    """Whether the kernels that are written in Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_takes(x: Tensor) -> bool:
    """Whether Triton computes on such a tensor: on a GPU or in its interpreter, if without gradients."""
    here = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return here and not x.requires_grad and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
