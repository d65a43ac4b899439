"""The Triton kernels against plain PyTorch, on a GPU or in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from given import sizes, tokens
from test_methods import golden, smallest, unit

from llava_pitome.kernels import average_triton, has_triton, matching_triton
from llava_pitome.merge import reduce
from llava_pitome.merge.plan import MergePlan, add_prefix_tokens, gather_tokens, make_plan
from llava_pitome.methods import pitome
from llava_pitome.methods.registry import choose

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# images, tokens, channels, tokens to remove: within one tile and over several, none a multiple of it
SHAPES = ((1, 7, 20, 3), (3, 36, 64, 18), (1, 49, 8, 4), (1, 130, 20, 1), (2, 130, 64, 65), (1, 65, 40, 17))
SETTINGS = [
    {"margin": margin, "alpha": alpha, "energy": energy}
    for margin, alpha in ((0.9, 1.0), (0.2, 1.0), (0.0, 0.5), (-0.3, 2.0))
    for energy in ("eq4", "elu")
]
# relative: orders of sums differ, and the interpreter truncates to bfloat16 where GPUs round
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def in_triton(metric, remove, depth=0.0, **parameters):
    return pitome.PiToMe(**parameters).merge_triton(metric, remove, depth).parent


def in_torch(metric, remove, depth=0.0, **parameters):
    return pitome.PiToMe(**parameters).merge(metric, remove, depth).parent


def average_in_torch(x, share, plan):
    return reduce._average(x, share, plan.slot, plan.kept, plan.gone)


def merge(batch, count, channels, remove, dtype=torch.float32, ordered=False):
    """Returns tokens, shares and the plan of a merge; tokens stand for 1 to 8 patches."""
    x = tokens(batch, count, channels, seed=count).to(DEVICE)
    order = tokens(batch, count, 1).argsort(1)[:, :, 0].to(DEVICE) if ordered else None
    plan = make_plan(choose(x, remove, "pitome").parent, count - remove, order)
    return x.to(dtype), shares(sizes(batch, count).to(DEVICE), plan), plan


def shares(size, plan):
    total = size.new_zeros(len(size), plan.length).scatter_add(1, plan.slot, size)
    return size / total.gather(1, plan.slot)


# Matching


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("batch, count, channels, remove", SHAPES)
def test_energies_and_parents_equal_pytorchs(batch, count, channels, remove, options):
    x = tokens(batch, count, channels, seed=count).to(DEVICE)
    energy = matching_triton.mean_energy(unit(x), **options)
    assert energy.dtype == torch.float32
    expected = pitome.mean_energy(unit(x).double(), **options)
    torch.testing.assert_close(energy.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(in_triton(x, remove, **options), in_torch(x, remove, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [0.0, 0.25, 23 / 24])
def test_half_precision_is_matched_in_float32_at_every_depth(depth, dtype):
    x = tokens(3, 36, 64, dtype).to(DEVICE)
    parent = in_triton(x, 18, depth)
    assert parent.dtype == torch.int64
    assert torch.equal(parent, in_torch(x.float(), 18, depth))


@pytest.mark.parametrize(
    "case, arrays", [pytest.param(c, a, id=c["name"]) for c, a in golden() if c.get("method") != "tome"]
)
def test_golden_groups_of_float64_match_in_float32(case, arrays):
    x = torch.from_numpy(arrays["features"]).float().to(DEVICE)
    for energy in (e for e in pitome.ENERGIES if f"groups_{e}" in arrays):
        parent = in_triton(x, case["remove"], margin=case["margin"], alpha=case["alpha"], energy=energy)
        assert torch.equal(smallest(parent.cpu()), torch.from_numpy(arrays[f"groups_{energy}"]).long()), (
            energy
        )


def test_one_of_two_tokens_merges_into_the_other():
    """Which one is a tie that the last bit decides."""
    assert smallest(in_triton(tokens(3, 2).to(DEVICE), 1).cpu()).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("energy", ["eq4", "elu"])
@pytest.mark.parametrize("margin, alpha", [(-1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("remove", [1, 5, 33, 65])
def test_ties_go_to_the_lower_index(remove, margin, alpha, energy):
    """Sums of halves are exact in every order; products in the interpreter depend on a token's position."""
    sign = torch.randint(0, 2, (2, 130, 4), generator=torch.Generator().manual_seed(0))
    x, options = (sign - 0.5).to(DEVICE), {"margin": margin, "alpha": alpha, "energy": energy}
    assert torch.equal(in_triton(x, remove, **options), in_torch(x, remove, **options))


@pytest.mark.parametrize("remove", [1, 9, 35])
@pytest.mark.parametrize("same", [torch.ones(1, 70, 16), torch.zeros(1, 70, 16)], ids=["ones", "zeros"])
def test_equal_tokens_all_merge_into_the_second(same, remove):
    expected = [1 if i < 2 * remove and i % 2 == 0 else i for i in range(70)]
    assert in_triton(same.to(DEVICE), remove).tolist() == [expected]


def test_a_strided_metric_is_matched():
    x = tokens(2, 21, 16).to(DEVICE)
    for view in (x[:, 1:], x[:, ::2], x.transpose(1, 2)):
        assert torch.equal(in_triton(view, 3), in_torch(view, 3))


@pytest.mark.parametrize("remove", [30, 47])
def test_more_than_half_are_removed_in_rounds(remove):
    x = tokens(2, 49, 20).to(DEVICE)
    parent = choose(x, remove, "pitome", triton=True).parent
    assert torch.equal(parent, choose(x, remove, "pitome").parent)


@pytest.mark.parametrize("remove", [5, -1])
def test_removing_a_count_out_of_range_raises(remove):
    with pytest.raises(ValueError, match=f"remove={remove} does not fit 9 tokens; allowed is 0 to 4"):
        in_triton(torch.ones(1, 9, 4), remove)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_raise_with_those_allowed(dtype):
    x, share, plan = merge(1, 9, 4, 2)
    allowed = rf"has dtype {dtype}; allowed are torch.float32, torch.bfloat16, torch.float16"
    with pytest.raises(ValueError, match=f"metric {allowed}"):
        in_triton(x.to(dtype), 2)
    with pytest.raises(ValueError, match=f"x {allowed}"):
        average_triton.average(x.to(dtype), share, plan)
    with pytest.raises(ValueError, match=f"share has dtype {dtype}"):
        average_triton.average(x, share.to(dtype), plan)


# Averages


@pytest.mark.parametrize("ordered", [False, True], ids=["raster", "ordered"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 8, 0), (3, 2, 8, 1), (1, 7, 600, 3)])
def test_averages_equal_pytorchs(shape, dtype, ordered):
    x, share, plan = merge(*shape, dtype, ordered)
    out = average_triton.average(x, share, plan)
    assert out.dtype == dtype
    expected = average_in_torch(x.float(), share, plan)
    torch.testing.assert_close(out.float(), expected, rtol=RELATIVE[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_in_its_slot_keeps_every_bit(dtype):
    x, share, plan = merge(3, 49, 20, 7, dtype)
    x[:, ::3, 0] = -0.0
    out = average_triton.average(x, share, plan)
    alone = (share.gather(1, plan.kept) == 1).unsqueeze(2)
    assert alone.sum() >= 3 * 35
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits) * alone, gather_tokens(x, plan.kept).view(bits) * alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slot_may_collect_all_tokens(dtype):
    x = tokens(2, 60, 8, dtype).to(DEVICE)
    plan = make_plan(torch.full((2, 60), 31, device=DEVICE), 1)
    out = average_triton.average(x, torch.full((2, 60), 1 / 60, device=DEVICE), plan)
    torch.testing.assert_close(out.float(), x.float().mean(1, keepdim=True), rtol=RELATIVE[dtype], atol=1e-6)


@pytest.mark.parametrize("values, total", [([1e9, -1e9, 4], 1), ([4, 1e9, -1e9], 0), ([1e9, 4, -1e9], 0)])
def test_tokens_are_added_by_ascending_position(values, total):
    """In float32 1 vanishes beside a quarter of a billion, unless the billions cancel first."""
    x = torch.tensor([*values[:2], 0, values[2]], device=DEVICE).view(1, 4, 1)
    plan = make_plan(torch.full((1, 4), 2, device=DEVICE), 1)
    assert average_triton.average(x, torch.full((1, 4), 0.25, device=DEVICE), plan).item() == total


def test_prefix_tokens_and_strided_tokens_are_averaged():
    x = tokens(2, 20, 16).to(DEVICE)
    plan = make_plan(add_prefix_tokens(in_torch(x, 6), 1), 15)
    x = torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous().transpose(1, 2)
    share = shares(torch.ones(2, 21, device=DEVICE), plan)
    out = average_triton.average(x, share, plan)
    torch.testing.assert_close(out, average_in_torch(x, share, plan), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 0], x[:, 0])


# Both


def test_images_of_a_batch_are_independent():
    x, share, plan = merge(3, 49, 20, 20, torch.bfloat16)
    parent, out = in_triton(x, 20), average_triton.average(x, share, plan)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(in_triton(x[one], 20), parent[one])
        alone = MergePlan(plan.slot[one], plan.length, plan.kept[one], plan.gone[one])
        assert torch.equal(average_triton.average(x[one], share[one], alone), out[one])


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that run."""
    called = []
    for module, name in ((matching_triton, "parents"), (average_triton, "average")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=kernel: called.append(n) or f(*a))
    return called


def test_kernels_run_where_they_are_requested(calls):
    assert has_triton()
    x, size, merged = tokens(2, 36, 20).to(DEVICE), torch.ones(2, 36, device=DEVICE), {}
    for triton in (False, True):
        parent = choose(x, 9, "pitome", triton=triton, depth=0.3).parent
        merged[triton] = reduce.average_tokens(x, size, make_plan(parent, 27), triton)
    assert calls == ["parents", "average"]
    torch.testing.assert_close(merged[True], merged[False])


@pytest.mark.parametrize(
    "method, options",
    [
        ("tome", {}),
        ("pitome", {"ordered": True}),
        ("pitome", {"candidates": 3}),
        ("pitome", {"split": "raster"}),
    ],
)
def test_other_methods_settings_and_gradients_are_left_to_pytorch(calls, method, options):
    x = tokens(2, 36, 20).to(DEVICE)
    result = choose(x, 9, method, triton=True, **options)
    assert torch.equal(result.parent, choose(x, 9, method, **options).parent)
    plan = make_plan(result.parent, 27)
    x.requires_grad_()
    reduce.average_tokens(x, torch.ones(2, 36, device=DEVICE), plan, triton=True)[0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not calls


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llava_pitome.kernels import average_triton, matching_triton

tile = matching_triton.TILE
kernels = [
    (matching_triton._energies, ["*fp32", "*fp32", "i32", "i32", "fp32", "fp32"], {"ELU": True, **tile}),
    (matching_triton._energies, ["*fp32", "*fp32", "i32", "i32", "fp32", "fp32"], {"ELU": False, **tile}),
    (matching_triton._closest, ["*fp32", "*i64", "*i64", "*i64", "i32", "i32", "i32"], tile),
]
for x in ("*fp32", "*bf16", "*fp16"):
    types = [x, "*fp32", "*i64", "*i64", "*i64", x, "i32", "i32", "i32"]
    kernels += [(average_triton._average, types, {"CHANNELS": n}) for n in (8, average_triton.CHANNELS)]
for capability in (80, 90):
    for kernel, types, constants in kernels:
        types = dict(zip(kernel.arg_names, types)) | dict.fromkeys(constants, "constexpr")
        made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32))
        assert "fma.rn.f32" in made.asm["ptx"], kernel
        assert "tf32" not in made.asm["ptx"], kernel
"""


@pytest.mark.skipif(GPU, reason="the other tests compile for the GPU")
def test_the_kernels_compile_for_gpus_without_tf32(tmp_path):
    """In a process of its own: Triton reads TRITON_INTERPRET on import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graphs_capture_matching_and_averages():
    x, size = tokens(2, 49, 20).to(DEVICE), torch.ones(2, 49, device=DEVICE)

    def step():
        parent = in_triton(x, 12)
        plan = make_plan(parent, 37)
        return parent, average_triton.average(x, shares(size, plan), plan)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parent, out = step()
    x.copy_(tokens(2, 49, 20, seed=1))
    graph.replay()
    assert torch.equal(parent, in_torch(x, 12))
    assert torch.equal(out, step()[1])
