"""Lets a CPU build of torch import a torchvision that was built for CUDA. Goes into .venv.vllm, see scripts/setup_vllm.sh.

vLLM's LLaVA imports torchvision, in every process it starts and before any plugin is loaded. A torchvision whose
compiled half cannot be loaded stops at the first description of an operator that nobody declared. So the two operators that
it describes unconditionally are declared in front of it; nothing here calls them.
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
