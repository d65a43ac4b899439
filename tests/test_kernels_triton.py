"""The Triton kernels against plain PyTorch, on a GPU or in Triton's interpreter on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_methods import HERE, golden, smallest, tokens, unit

from llava_pitome import methods
from llava_pitome.kernels import average_triton, matching_triton, triton_is_there
from llava_pitome.merge import plan as merging
from llava_pitome.methods import pitome
from llava_pitome.methods import registry as matching

GPU = torch.cuda.is_available()

DEVICE = "cuda" if GPU else "cpu"
in_triton = methods.METHODS["pitome"].triton
ENERGIES = ("eq4", "elu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# images, tokens, channels, tokens that go: within one tile and over several, none of them a multiple of it
SHAPES = (
    (1, 1, 8, 0),
    (1, 7, 20, 3),
    (3, 36, 64, 18),
    (1, 49, 8, 4),
    (1, 130, 20, 1),
    (2, 130, 64, 65),
    (1, 65, 40, 17),
)
MARGINS = ((0.9, 1.0), (0.2, 1.0), (0.0, 0.5), (-0.3, 2.0))
# of the value: orders of sums differ, and the interpreter cuts bfloat16 off, by up to 2**-7, where GPUs round
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
GOLDEN = [
    pytest.param(case, arrays, id=case["name"])
    for case, arrays in golden(HERE)
    if case.get("method") != "tome"
]


def reference(metric, remove, **parameters):
    """The reference's parents; it has none to give where nothing goes."""
    if not remove:
        return torch.arange(metric.shape[1], device=metric.device).repeat(metric.shape[0], 1)
    return pitome.parents(metric, remove, **parameters)


def plain(x, shares, plan):
    """The reference's averages."""
    return merging._average(x, shares, plan.slot, plan.kept, plan.gone)


def merged(batch, count, channels, remove, dtype=torch.float32, order=False):
    """Tokens, shares and the plan of a merge whose tokens stand for 1 to 4 patches."""
    x = tokens(batch, count, channels, seed=count).to(DEVICE)
    down = tokens(batch, count, 1).argsort(1)[:, :, 0].to(DEVICE) if order else None
    plan = merging.make_plan(reference(x, remove), count - remove, down)
    size = torch.randint(1, 5, (batch, count), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    return x.to(dtype), share(size, plan), plan


def share(size, plan):
    total = size.new_zeros(len(size), plan.length).scatter_add(1, plan.slot, size)
    return size / total.gather(1, plan.slot)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("margin, alpha", MARGINS)
@pytest.mark.parametrize("batch, count, channels", sorted({shape[:3] for shape in SHAPES}))
def test_energies_are_those_of_the_reference_in_float64(batch, count, channels, margin, alpha, energy):
    x = unit(tokens(batch, count, channels).to(DEVICE))
    expected = pitome.mean_energy(x.double(), margin, alpha, energy)
    found = matching_triton.mean_energy(x, margin, alpha, energy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("margin, alpha", MARGINS)
@pytest.mark.parametrize("batch, count, channels, remove", SHAPES)
def test_parents_are_those_of_the_reference(batch, count, channels, remove, margin, alpha, energy):
    x = tokens(batch, count, channels, seed=count).to(DEVICE)
    known = {"margin": margin, "alpha": alpha, "energy": energy}
    assert torch.equal(in_triton(x, remove, **known), reference(x, remove, **known))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [0.0, 0.25, 23 / 24])
@pytest.mark.parametrize("batch, count, channels, remove", SHAPES[1:4])
def test_half_precision_is_matched_in_float32_at_every_depth(batch, count, channels, remove, depth, dtype):
    x = tokens(batch, count, channels, dtype, seed=count).to(DEVICE)
    parent = in_triton(x, remove, depth=depth)
    assert parent.dtype == torch.int64
    assert torch.equal(parent, pitome.parents(x.float(), remove, depth=depth))


@pytest.mark.parametrize("case, arrays", GOLDEN)
def test_golden_groups_of_float64_are_found_in_float32(case, arrays):
    x = torch.from_numpy(arrays["features"]).float().to(DEVICE)
    for energy in (e for e in ENERGIES if f"groups_{e}" in arrays):
        parent = in_triton(x, case["remove"], margin=case["margin"], alpha=case["alpha"], energy=energy)
        expected = torch.from_numpy(arrays[f"groups_{energy}"]).long()
        assert torch.equal(smallest(parent.cpu()), expected), energy


def test_of_two_tokens_one_joins_the_other():
    """Which one is a tie that the last bit decides."""
    assert smallest(in_triton(tokens(3, 2).to(DEVICE), 1).cpu()).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("margin, alpha", [(-1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("remove", [1, 5, 33, 65])
def test_ties_go_to_the_lower_index(remove, margin, alpha, energy):
    """Sums of halves are exact in every order; the interpreter's products round by a token's position."""
    sign = torch.randint(0, 2, (2, 130, 4), generator=torch.Generator().manual_seed(0))
    x, known = (sign - 0.5).to(DEVICE), {"margin": margin, "alpha": alpha, "energy": energy}
    assert torch.equal(in_triton(x, remove, **known), pitome.parents(x, remove, **known))


@pytest.mark.parametrize("remove", [1, 9, 35])
@pytest.mark.parametrize("same", [torch.ones(1, 70, 16), torch.zeros(1, 70, 16)], ids=["ones", "zeros"])
def test_equal_tokens_all_join_the_second(same, remove):
    expected = [1 if i < 2 * remove and i % 2 == 0 else i for i in range(70)]
    assert in_triton(same.to(DEVICE), remove).tolist() == [expected]


def test_a_metric_that_lies_scattered_in_memory_is_matched_too():
    x = tokens(2, 21, 16).to(DEVICE)
    for view in (x[:, 1:], x[:, ::2], x.transpose(1, 2)):
        assert torch.equal(in_triton(view, 3), pitome.parents(view, 3))


def test_images_are_matched_and_averaged_alone_as_in_a_batch():
    x, shares, plan = merged(3, 49, 20, 20, torch.bfloat16)
    parent = in_triton(x, 20)
    out = average_triton.average(x, shares, plan)
    for i in range(3):
        own = slice(i, i + 1)
        assert torch.equal(in_triton(x[own], 20), parent[own])
        one = merging.MergePlan(plan.slot[own], plan.length, plan.kept[own], plan.gone[own])
        assert torch.equal(average_triton.average(x[own], shares[own], one), out[own])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"remove": 5}, "remove=5 does not fit 9 tokens; allowed is 0 to 4"),
        ({"remove": -1}, "remove=-1 .*0 to 4"),
        ({"energy": "eq5"}, "energy='eq5' is unknown"),
        ({"margin": float("nan")}, "margin=nan is not allowed"),
        ({"alpha": "1"}, "alpha='1' is not allowed"),
    ],
)
def test_what_cannot_be_matched_raises(options, message):
    with pytest.raises(ValueError, match=message):
        in_triton(torch.ones(1, 9, 4), **{"remove": 2, **options})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_raise_with_those_that_are_allowed(dtype):
    x, shares, plan = merged(1, 9, 4, 2)
    allowed = rf"has dtype {dtype}; allowed are torch.float32, torch.bfloat16, torch.float16"
    with pytest.raises(ValueError, match=f"metric {allowed}"):
        in_triton(x.to(dtype), 2)
    with pytest.raises(ValueError, match=f"x {allowed}"):
        average_triton.average(x.to(dtype), shares, plan)
    with pytest.raises(ValueError, match=f"share has dtype {dtype}"):
        average_triton.average(x, shares.to(dtype), plan)


@pytest.mark.parametrize("order", [False, True], ids=["raster", "ranked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, count, channels, remove", [*SHAPES, (3, 2, 8, 1), (1, 7, 600, 3)])
def test_averages_are_those_of_the_reference(batch, count, channels, remove, dtype, order):
    x, shares, plan = merged(batch, count, channels, remove, dtype, order)
    out = average_triton.average(x, shares, plan)
    assert out.dtype == dtype
    expected = plain(x.float(), shares, plan)
    torch.testing.assert_close(out.float(), expected, rtol=STEP[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_stays_alone_comes_out_bit_by_bit(dtype):
    x, shares, plan = merged(3, 49, 20, 7, dtype)
    x[:, ::3, 0] = -0.0
    out = average_triton.average(x, shares, plan)
    alone = (shares.gather(1, plan.kept) == 1).unsqueeze(2)
    assert alone.sum() >= 3 * 35
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    kept = merging.gather_tokens(x, plan.kept)
    assert torch.equal(out.view(bits) * alone, kept.view(bits) * alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_slot_may_collect_all_there_are(dtype):
    x = tokens(2, 60, 8, dtype).to(DEVICE)
    plan = merging.make_plan(torch.full((2, 60), 31, device=DEVICE), 1)
    out = average_triton.average(x, torch.full((2, 60), 1 / 60, device=DEVICE), plan)
    torch.testing.assert_close(out.float(), x.float().mean(1, keepdim=True), rtol=STEP[dtype], atol=1e-6)


@pytest.mark.parametrize("values, total", [([1e9, -1e9, 4], 1), ([4, 1e9, -1e9], 0), ([1e9, 4, -1e9], 0)])
def test_tokens_are_added_by_rising_position(values, total):
    """One is lost beside a quarter of a billion in float32, unless the billions cancel first."""
    x = torch.tensor([*values[:2], 0, values[2]], device=DEVICE).view(1, 4, 1)
    plan = merging.make_plan(torch.full((1, 4), 2, device=DEVICE), 1)
    out = average_triton.average(x, torch.full((1, 4), 0.25, device=DEVICE), plan)
    assert out.item() == total


def test_tokens_in_front_and_tokens_scattered_in_memory_are_averaged_too():
    x = tokens(2, 20, 16).float().to(DEVICE)
    wide = merging.make_plan(merging.add_prefix_tokens(reference(x, 6), 1), 15)
    x = torch.cat([x, x[:, :1]], 1).transpose(1, 2).contiguous().transpose(1, 2)
    shares = share(torch.ones(2, 21, device=DEVICE), wide)
    out = average_triton.average(x, shares, wide)
    torch.testing.assert_close(out, plain(x, shares, wide), rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 0], x[:, 0])


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


@pytest.mark.skipif(GPU, reason="the other tests compile for the GPU that is there")
def test_the_kernels_compile_for_gpus_without_tf32(tmp_path):
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=Path(merging.__file__).parents[1],
        env=known | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_cuda_graphs_capture_matching_and_averages():
    x = tokens(2, 49, 20).to(DEVICE)
    size = torch.ones(2, 49, device=DEVICE)

    def step():
        parent = in_triton(x, 12)
        plan = merging.make_plan(parent, 37)
        return parent, average_triton.average(x, share(size, plan), plan)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        parent, out = step()
    x.copy_(tokens(2, 49, 20, seed=1))
    graph.replay()
    assert torch.equal(parent, pitome.parents(x, 12))
    assert torch.equal(out, step()[1])


def test_matching_and_merging_take_the_kernels_where_they_are_asked_to(monkeypatch):
    assert triton_is_there()
    called = []
    for module, name in ((matching_triton, "parents"), (average_triton, "average")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _f=plain, **k: called.append(_n) or _f(*a, **k))
    x = tokens(2, 36, 20, dtype=torch.float32).to(DEVICE)
    size, found = torch.ones(2, 36, device=DEVICE), {}
    for triton in (False, True):
        parent = matching.choose(x, 9, "pitome", triton=triton, depth=0.3).parent
        found[triton] = merging.average_tokens(x, size, merging.make_plan(parent, 27), triton)
    assert called == ["parents", "average"]
    torch.testing.assert_close(found[True], found[False])


def test_what_has_no_kernel_or_needs_gradients_is_left_to_pytorch(monkeypatch):
    for module, name in ((matching_triton, "parents"), (average_triton, "average")):
        monkeypatch.setattr(module, name, lambda *_a, **_k: pytest.fail("Triton was called"))
    x = tokens(2, 36, 20, dtype=torch.float32).to(DEVICE)
    parent = matching.choose(x, 9, "tome", triton=True).parent
    leaf = x.clone().requires_grad_()
    merged_, _ = merging.average_tokens(
        leaf, torch.ones(2, 36, device=DEVICE), merging.make_plan(parent, 27), True
    )
    merged_.sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("remove", [30, 47])
def test_more_than_half_go_in_rounds(remove):
    x = tokens(2, 49, 20, dtype=torch.float32).to(DEVICE)
    assert torch.equal(
        matching.choose(x, remove, "pitome", triton=True).parent, matching.choose(x, remove, "pitome").parent
    )
