"""Lets a CPU build of torch import a torchvision that was built for CUDA.

scripts/setup_vllm.sh puts this into .venv.vllm where it is needed. vLLM imports torchvision in every process
that it starts, before any plugin is loaded. A torchvision whose compiled half cannot be loaded raises where
it describes two operators that nobody declared. So they are declared in front of it; a LLaVA calls neither.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms", "qnms")
declared = []  # the declarations last as long as this library object


class Declaring(MetaPathFinder):
    """Declares the operators when torchvision is first looked for; finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        """Takes itself off again once it has done its work."""
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            declared.append(torch.library.Library("torchvision", "DEF"))
            for operator in OPERATORS:
                declared[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declaring())
