"""Import rules that import-linter (pyproject.toml) cannot express."""

import ast
import subprocess
import sys
from pathlib import Path

import llava_pitome

PACKAGE = Path(llava_pitome.__file__).parent
ONLY_TORCH = """
import sys, torch

def state():
    return [set(vars(c)) for c in (torch.nn.Module, torch.Tensor)], torch.nn.Module.__call__

before = state()
for name in "transformers accelerate safetensors PIL peft datasets gradio fastapi triton".split():
    sys.modules.setdefault(name)  # an import of it raises
import llava_pitome
assert state() == before, "importing the package changed a class of torch"
assert "torch._dynamo" not in sys.modules
assert llava_pitome.parents(torch.eye(4)[None], 1).shape == (1, 4)
"""


def test_importing_the_package_needs_torch_alone_and_changes_nothing_of_it():
    command = [sys.executable, "-c", ONLY_TORCH]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_sorted():
    assert sorted(llava_pitome.__all__) == llava_pitome.__all__
    assert all(hasattr(llava_pitome, name) for name in llava_pitome.__all__)


def test_no_code_outside_the_registry_compares_a_method_name():
    methods = set(llava_pitome.METHODS)
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "methods":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                constants = {str(child.value) for child in ast.walk(node) if isinstance(child, ast.Constant)}
                assert not constants & methods, f"{file.relative_to(PACKAGE)}:{node.lineno}"
