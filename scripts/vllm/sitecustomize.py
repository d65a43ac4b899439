"""Lets a CPU build of torch import a torchvision that was built for CUDA.

scripts/setup_vllm.sh copies this file into .venv.vllm where it is needed. vLLM imports torchvision in every
process before any plugin is loaded. A torchvision whose compiled half cannot be loaded raises where it
describes two undeclared operators, so they are declared before its import. A LLaVA calls neither.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms", "qnms")
libraries = []  # the declarations last as long as the library object


class OperatorDeclarer(MetaPathFinder):
    """Declares the operators at the first import of torchvision; finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        """Declares the operators once, before torchvision is found by another finder."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            libraries.append(torch.library.Library("torchvision", "DEF"))
            for operator in OPERATORS:
                libraries[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, OperatorDeclarer())
