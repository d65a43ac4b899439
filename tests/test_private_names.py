"""Private names of torch, which has no upper bound: each is guarded, and the package works without it."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from conftest import make_model
from prompts import PROMPTS, batch, generate
from torch import nn

from llava_pitome import MergeConfig, api, apply, merge_tokens, remove
from llava_pitome.cli.bench import memory
from llava_pitome.cli.bench.variants import compile_limit
from llava_pitome.hooks import cache_identity
from llava_pitome.kernels import cpu_attention

ROOT = Path(__file__).parents[1]
GUARDED = {  # by the tests below
    "torch.utils._python_dispatch",
    "_version", "_dynamo", "_compiled_call_impl", "_orig_mod",
    "_is_avx512_bf16_supported", "_is_amx_tile_supported",
}  # fmt: skip
OF_HOOKS = {  # of hooks/hook_owner.py, which finds the hooks on copies of a module
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
}  # fmt: skip
FILES = [file for folder in ("llava_pitome", "eval", "train") for file in (ROOT / folder).rglob("*.py")]


def private_names(tree):
    """Names of torch in a file that begin with an underscore: attributes, imports, strings for getattr."""
    module_names = {name for name in dir(nn.Module()) if name.startswith("_")} | {"_orig_mod"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            if "._" in node.module:
                yield node.module
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        elif isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            written = ast.unparse(node)
            if written.startswith("torch.") and "._" in written:
                yield written
            elif node.attr in module_names:
                yield node.attr
        elif isinstance(node, ast.Constant) and node.value in module_names | GUARDED:
            yield node.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_other_private_name_of_torch_is_used(file):
    found = {name for name in private_names(ast.parse(file.read_text())) if not name.startswith("__")}
    assert found - OF_HOOKS <= GUARDED


def test_the_check_finds_private_names():
    code = "import torch\nfrom torch._C import x\nfrom torch.cpu import _y\ntorch.cpu._z()\nmodule._buffers"
    assert set(private_names(ast.parse(code))) == {"torch._C", "_y", "torch.cpu._z", "_buffers"}


@pytest.fixture
def unknown_processor():
    cpu_attention._has_bfloat16_products.cache_clear()
    yield
    cpu_attention._has_bfloat16_products.cache_clear()


MANY = torch.zeros(1, 16, 577, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("capabilities", "products", "tiles", "fast"),
    [
        ({"avx512_bf16": True, "amx_tile": False}, None, None, True),
        ({"avx512_bf16": True, "amx_tile": True}, None, None, False),
        ({"sve": True}, None, None, False),
        (None, True, False, True),
        (None, True, True, False),
        (None, False, False, False),
        (None, True, None, False),
        (None, None, None, False),
    ],
)
def test_the_attention_kernel_is_chosen_where_the_processor_is_known(
    capabilities, products, tiles, fast, monkeypatch, unknown_processor
):
    values = {
        "get_capabilities": capabilities,
        "_is_avx512_bf16_supported": products,
        "_is_amx_tile_supported": tiles,
    }
    for name, value in values.items():
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if value is not None:
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    assert cpu_attention.is_faster(MANY) is fast


def test_a_tower_merges_on_a_processor_that_torch_says_nothing_about(monkeypatch, unknown_processor):
    for name in ("get_capabilities", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    model = make_model().to(torch.bfloat16)
    with merge_tokens(model, MergeConfig(tokens=5)), torch.no_grad():
        features = model.get_image_features(torch.zeros(1, 3, 48, 48, dtype=torch.bfloat16)).pooler_output
    assert features[0].shape[0] == 5


def test_compiled_graphs_are_dropped_where_torch_does_not_say_whether_there_are_any(monkeypatch):
    """`torch.nn.Module` reads the name itself, so that its call is replaced, too."""
    dropped = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(1))
    model = make_model()
    apply(model, MergeConfig(tokens=5))
    remove(model)
    assert not dropped
    monkeypatch.setattr(nn.Module, "__call__", nn.Module._call_impl)
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    apply(model, MergeConfig(tokens=5))
    assert len(dropped) == 1
    with torch.no_grad():
        assert model.get_image_features(torch.zeros(1, 3, 48, 48)).pooler_output[0].shape[0] == 5
    remove(model)
    assert len(dropped) == 2


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_parts_are_known(how, monkeypatch):
    dropped = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: dropped.append(1))
    model = make_model()
    if how == "in place":
        model.model.vision_tower.compile(backend="eager")
    else:
        model.model.vision_tower = torch.compile(model.model.vision_tower, backend="eager")
    api._reset_compiled(model)
    assert dropped


@pytest.mark.parametrize("missing", ["_dynamo", "recompile_limit", "fail_on_recompile_limit_hit"])
def test_a_bench_without_a_limit_on_recompiling_goes_on_with_a_warning(missing, monkeypatch, caplog):
    class Settings:
        patch = recompile_limit = fail_on_recompile_limit_hit = None

    class Dynamo:
        config = Settings

    if missing == "_dynamo":
        monkeypatch.setattr(torch, "_dynamo", None)
    else:
        monkeypatch.delattr(Settings, missing)
        monkeypatch.setattr(torch, "_dynamo", Dynamo)
    with compile_limit(3):
        pass
    assert "may be timed uncompiled" in caplog.text


def test_a_cache_goes_on_without_the_count_of_writes(monkeypatch, model, processor, pictures):
    with merge_tokens(model, MergeConfig(decoder={0: 0.5}), processor):
        inputs = batch(processor, PROMPTS, pictures)
        expected = generate(model, inputs)
        monkeypatch.setattr(cache_identity, "_version", lambda _tensor: None)
        assert torch.equal(generate(model, inputs), expected)


def test_peak_memory_is_counted_without_the_private_dispatch_mode(monkeypatch):
    import torch.utils._python_dispatch as dispatch

    with monkeypatch.context() as patched:
        patched.delattr(dispatch, "TorchDispatchMode")
        importlib.reload(memory)
    try:
        assert memory.TorchDispatchMode is torch.overrides.TorchFunctionMode
        cpu = torch.device("cpu")
        assert memory.peak_bytes(lambda: [torch.zeros(1000), torch.zeros(1000)], cpu) == 8000
        assert memory.peak_bytes(lambda: torch.zeros(1000).view(10, 100).t()[3:], cpu) == 4000
        assert memory.peak_bytes(lambda: torch.zeros(1000).add_(1).chunk(2), cpu) == 4000
    finally:
        importlib.reload(memory)
    assert memory.TorchDispatchMode is dispatch.TorchDispatchMode
