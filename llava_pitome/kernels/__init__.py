"""Faster implementations of what plain PyTorch computes elsewhere, each tested against it."""

import importlib.util
import os

import torch
from torch import Tensor


def has_triton() -> bool:
    """Returns whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def supports_triton(x: Tensor) -> bool:
    """Returns whether the Triton kernels take a tensor: on a GPU or in the interpreter, without gradients."""
    runs = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and not x.requires_grad and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
