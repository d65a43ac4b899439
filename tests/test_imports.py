"""The order of the package: every module may import what stands in a line above it, never beside or below."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llava_pitome

PACKAGE = Path(llava_pitome.__file__).parent
ORDER = (
    ("kernels",),
    ("kernels.average_triton", "kernels.matching_triton"),
    ("schedule", "merging", "kernels.attention"),
    ("methods.pitome", "methods.tome", "methods.random", "methods.survivors"),
    ("methods.tofu", "methods.dct", "methods.diffrate", "methods.grid", "methods.fastv"),
    ("methods.visionzip", "methods.prumerge", "methods.divprune", "methods.sparsevlm"),
    ("methods", "folding"),
    ("matching", "recipes"),
    ("validation", "spectral", "counts"),
    ("config",),
    ("places",),
    ("places.attention", "places.blocks", "places.past", "places.prompt", "places.scores", "places.shrink"),
    ("places.merger", "places.inside"),
    ("places.looks", "places.llm", "places.passing"),
    (
        "places.asked",
        "places.arrivals",
    ),
    ("places.tower",),
    ("places.prefix",),
    ("places.decoder",),
    ("places.everywhere",),
    ("language", "processor", "original"),
    ("llava",),
    ("embedded.scenes",),
    ("embedded.questions", "embedded.render"),
    ("embedded", "adapters"),
    ("conversion.configs", "conversion.processors", "conversion.weights"),
    ("conversion",),
    ("checkpoints",),
    ("api", "options", "pictures"),
    ("commands", "drawing.history"),
    ("drawing.choices",),
    ("",),  # the package itself: names alone
)
HEAVY = {"transformers", "tokenizers", "accelerate", "bitsandbytes", "peft", "PIL", "numpy", "datasets",
         "pyarrow", "pandas", "lmms_eval", "loguru",
         "tqdm", "rich", "vllm", "gradio", "fastapi", "uvicorn", "matplotlib", "safetensors",
         "triton", "llava"}  # fmt: skip
KERNELS = ("kernels.matching_triton", "kernels.average_triton")  # written in Triton
HOSTS = {
    "transformers": (
        "adapters", "checkpoints", "repeats", "lmms", "vllm_plugin.chat", "vllm_plugin.model",
        "bench.targets", "chat.streaming", "serving.answering", "serving.app", "conversion",
        "conversion.configs",
        "conversion.processors", "conversion.weights",
    ),
    "PIL": (
        "pictures", "embedded.dataset", "lmms", "drawing.command", "drawing.view", "drawing.overlay",
        "drawing.heat", "drawing.lettering", "drawing.sheet", "drawing.study", "drawing.panels",
        "chat.conversation", "serving.images", "web.desk", "web.examples",
    ),
    "tokenizers": ("conversion.processors",),
    "safetensors": ("conversion.weights", "vllm_plugin.renamed"),
    "llava": (),  # the original package: its classes are known by name
    "lmms_eval": ("lmms",),
    "vllm": ("vllm_plugin.choose", "vllm_plugin.model"),
    "triton": KERNELS,
    "gradio": ("web.checked", "web.launching", "web.page", "web.pressing"),
    "fastapi": ("serving.app",),
    "openai": (),
}  # fmt: skip


def name_of(file):
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file, top_only=False):
    """Full names of the modules a file imports, those inside functions too unless `top_only`."""
    tree = ast.parse(file.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            own = node.module == "llava_pitome" or node.module.startswith("llava_pitome.")
            modules = [m for m in inside if own and m.removeprefix("llava_pitome.") in FILES]
            yield from modules or [node.module]


def rank(name):
    """How far down a module stands; what is not named stands at the end: measure, draw, adapters, cli."""
    return next((i for i, names in enumerate(ORDER) if name in names), len(ORDER))


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_upward(name):
    for module in imported(FILES[name]):
        if module.split(".")[0] != "llava_pitome":
            continue
        other = module.removeprefix("llava_pitome").lstrip(".")
        assert other in FILES, f"{name} imports {module}, which is no module"
        if rank(name) < len(ORDER):
            assert rank(other) < rank(name), f"{name} imports {module}, which stands above it"
        else:
            assert other != name


@pytest.mark.parametrize(
    "name", ["schedule", "merging", "methods", "config", "places.tower", "llava", "processor", "api"]
)
def test_the_named_modules_are_there(name):
    assert name in FILES


def test_no_imports_go_in_a_circle():
    graph = {
        name: {
            m.removeprefix("llava_pitome").lstrip(".") for m in imported(file) if m.startswith("llava_pitome")
        }
        for name, file in FILES.items()
    }
    done = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if name not in done and needs <= done}
        assert free, f"these import each other: {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("host, files", HOSTS.items())
def test_a_host_is_imported_in_its_adapter_only(host, files):
    users = {name for name, file in FILES.items() if any(m.split(".")[0] == host for m in imported(file))}
    assert users <= set(files)
    assert host != "transformers" or "checkpoints" in users


@pytest.mark.parametrize(
    "name", [n for names in ORDER for n in names if n in FILES and not n.startswith("embedded.")]
)
def test_the_core_imports_nothing_heavy_when_it_is_imported(name):
    heavy = {m.split(".")[0] for m in imported(FILES[name], top_only=True)} & HEAVY
    assert heavy == ({"triton"} if name in KERNELS else set())


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_in_triton_is_imported_inside_functions_only(name):
    assert not {f"llava_pitome.{kernel}" for kernel in KERNELS} & set(imported(FILES[name], top_only=True))


def test_importing_the_package_needs_torch_only():
    blocked = sorted(HEAVY - {"numpy"})  # numpy may come with torch
    code = (
        "import sys, torch\n"
        f"for name in {blocked!r}:\n"
        "    if name not in sys.modules: sys.modules[name] = None\n"  # an import of it raises from here on
        "before = set(sys.modules)\n"  # what torch itself needs
        "import llava_pitome\n"
        f"found = {{m.split('.')[0] for m in set(sys.modules) - before}} & set({blocked!r})\n"
        "assert not found, found\n"
        "print(llava_pitome.parents(torch.eye(4)[None], 1).shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 4])"


def test_importing_the_package_changes_nothing_of_torch():
    code = (
        "import torch\n"
        "names = [(c, set(vars(c))) for c in (torch.nn.Module, torch.Tensor, torch.nn.Linear)]\n"
        "call = torch.nn.Module.__call__\n"
        "import llava_pitome\n"
        "assert all(set(vars(c)) == before for c, before in names)\n"
        "assert torch.nn.Module.__call__ is call\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_all_there():
    assert sorted(llava_pitome.__all__) == llava_pitome.__all__
    assert all(hasattr(llava_pitome, name) for name in llava_pitome.__all__)


def test_no_method_is_asked_for_by_name_outside_its_folder():
    for name, file in FILES.items():
        if name.startswith("methods"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare):
                constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
                assert not set(constants) & set(map(str, llava_pitome.METHODS)), f"{name}:{node.lineno}"
