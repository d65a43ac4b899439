"""Import rules that import-linter (pyproject.toml) cannot express."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import llava_pitome

PACKAGE = Path(llava_pitome.__file__).parent
FACTORIES = {function.__name__ for function in _device_constructors()} | {"Generator"}
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


def named_in(tree):
    """Yields each call of a function of torch that makes a tensor: its name, its keywords, its node."""
    modules, functions = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                alias.asname or alias.name for alias in node.names if alias.name.split(".")[0] == "torch"
            }
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            functions |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and ast.unparse(function.value) in modules:
            yield function.attr, node
        elif isinstance(function, ast.Name) and function.id in functions:
            yield functions[function.id], node


def without_a_device(source):
    """Returns the lines of the calls that make a tensor on the default device."""
    return [
        node.lineno
        for name, node in named_in(ast.parse(source))
        if name in FACTORIES
        and not any(keyword.arg == "device" for keyword in node.keywords)
        and not (name == "Generator" and node.args)
    ]


@pytest.mark.parametrize("folder", ["llava_pitome", "eval", "train"])
def test_every_new_tensor_is_given_a_device(folder):
    """The default device is another one where somebody sets it, as vLLM does while a model is made."""
    found = {
        str(file.relative_to(PACKAGE.parent)): lines
        for file in (PACKAGE.parent / folder).rglob("*.py")
        if (lines := without_a_device(file.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "line, is_found",
    [
        ("torch.zeros(3)", True),
        ("torch.full((2,), 1, dtype=torch.long)", True),
        ("torch.Generator()", True),
        ("arange(3)", True),
        ("make(3)", True),
        ("t.ones(3)", True),
        ("torch.zeros(3, device=x.device)", False),
        ("torch.Generator('cpu')", False),
        ("torch.zeros_like(x)", False),
        ("x.new_zeros(3)", False),
        ("numpy.zeros(3)", False),
    ],
)
def test_a_tensor_without_a_device_is_found(line, is_found):
    imports = "import torch, numpy\nimport torch as t\nfrom torch import arange, empty as make\n"
    assert bool(without_a_device(imports + line)) == is_found
