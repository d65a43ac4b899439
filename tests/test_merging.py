import oracle
import pytest
import torch
from given import MIXING, PRUNING, decide, kept, sizes, tokens

from llava_pitome import METHODS, parents
from llava_pitome.merge.plan import (
    add_prefix_tokens,
    compose,
    log_size_bias,
    make_plan,
    trace,
    unmerge,
    without_prefix_tokens,
)
from llava_pitome.merge.reduce import MergeResult, average_tokens, reduce_tokens

SIZES = ((6, 2), (17, 8), (36, 3), (49, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXACT = torch.float64
ABSOLUTE = {torch.float32: 1e-4, torch.bfloat16: 5e-1, EXACT: 1e-10}
CASES = [*((*size, EXACT) for size in SIZES), (49, 40, torch.float32), (49, 40, torch.bfloat16)]


def pairs(count, dtype=EXACT):
    """Returns tokens and sizes of two images."""
    return tokens(2, count, dtype=dtype), sizes(2, count)


# Plans


@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_kept_tokens_stay_in_raster_order(method, count, remove):
    parent = decide(tokens(2, count), remove, method).parent
    plan = make_plan(parent, count - remove)
    for slot, row, stays in zip(plan.slot, parent, kept(parent)):
        assert slot[stays].tolist() == list(range(count - remove))
        assert torch.equal(slot, slot[row])


def test_an_order_sorts_kept_tokens_by_rank():
    plan = make_plan(torch.tensor([[0, 0, 2, 4, 4]]), 3, order=torch.tensor([[4, 0, 2, 1, 3]]))
    assert plan.slot.tolist() == [[2, 2, 0, 1, 1]]


def test_a_plan_without_prefix_tokens_is_the_plan_of_the_rest():
    parent = parents(tokens(2, 12), 4)
    plan, expected = make_plan(add_prefix_tokens(parent, 1), 9), make_plan(parent, 8)
    assert plan.slot[:, 0].tolist() == [0, 0]
    for found, value in zip(without_prefix_tokens(plan, 1), expected):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))


def merges(count, removes):
    """Returns successive merges, their parents as lists, and the last tokens and sizes."""
    x, size, plans, lists = tokens(2, count, dtype=EXACT), torch.ones(2, count), [], []
    for remove in removes:
        parent = parents(x, remove)
        plans.append(make_plan(parent, x.shape[1] - remove))
        lists.append(parent.tolist())
        x, size = average_tokens(x, size, plans[-1])
    return plans, lists, x, size


def test_a_trace_equals_the_oracle_and_finds_the_average_of_every_patch():
    plans, lists, x, size = merges(30, (10, 3, 8))
    start, slot = tokens(2, 30, dtype=EXACT), trace(plans)
    for b in range(2):
        position = list(range(30))
        for parent in (rows[b] for rows in lists):
            stays = [i for i, p in enumerate(parent) if p == i]
            position = [stays.index(parent[i]) for i in position]
        assert slot[b].tolist() == position
        assert torch.bincount(slot[b], minlength=9).tolist() == size[b].tolist()
        for token in range(9):
            torch.testing.assert_close(x[b, token], start[b, slot[b] == token].mean(0))


def test_a_trace_of_one_merge_is_its_slots_and_of_none_raises():
    plans, *_ = merges(12, (5,))
    assert torch.equal(trace(plans), plans[0].slot)
    with pytest.raises(ValueError, match="plans is empty"):
        trace([])


def test_two_merges_compose_into_one():
    x, size = tokens(2, 20, dtype=EXACT), torch.ones(2, 20)
    plan = make_plan(parents(x, 8), 12)
    between, between_size = average_tokens(x, size, plan)
    second = parents(between, 5, "tome")
    both = compose(second, plan)
    assert torch.equal(both.gather(1, both), both)
    expected, total = average_tokens(between, between_size, make_plan(second, 7))
    found, found_total = average_tokens(x, size, make_plan(both, 7))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found_total, total)


# Averages


@pytest.mark.parametrize("count, remove, dtype", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_averages_conserve_the_sum_of_size_times_token(method, count, remove, dtype):
    x, size = pairs(count, dtype)
    plan = make_plan(decide(x, remove, method).parent, count - remove)
    merged, total = average_tokens(x, size, plan)
    assert (merged.dtype, merged.shape, total.shape) == (dtype, (2, count - remove, 8), (2, count - remove))
    assert torch.equal(total.sum(1), size.sum(1))
    before, after = ((t.double() * s.double()[..., None]).sum(1) for t, s in ((x, size), (merged, total)))
    torch.testing.assert_close(after, before, rtol=0, atol=ABSOLUTE[dtype])


@pytest.mark.parametrize("remove", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_token_alone_in_its_slot_keeps_every_bit(method, dtype, remove):
    x, size = pairs(20, dtype)
    parent = decide(x, remove, method).parent
    plan = make_plan(parent, 20 - remove)
    merged, total = average_tokens(x, size, plan)
    for b in range(2):
        alone = [i for i in range(20) if (parent[b] == parent[b, i]).sum() == 1]
        assert alone and (remove or len(alone) == 20)
        assert torch.equal(merged[b, plan.slot[b, alone]], x[b, alone])
        assert torch.equal(total[b, plan.slot[b, alone]], size[b, alone])


def test_a_merged_token_is_the_average_weighted_by_size():
    x, size = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]]), torch.tensor([[2.0, 1.0, 1.0, 5.0]])
    merged, total = average_tokens(x, size, make_plan(torch.tensor([[2, 1, 2, 2]]), 2))
    assert merged.flatten().tolist() == pytest.approx([4.0, (2 * 1 + 1 * 7 + 5 * 9) / 8])
    assert total.tolist() == [[1.0, 8.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_unmerged_tokens_are_equal_within_a_group_and_merge_to_themselves(method, dtype):
    x, size = pairs(20, dtype)
    parent = decide(x, 12, method).parent
    plan = make_plan(parent, 8)
    merged, _ = average_tokens(x, size, plan)
    copies = unmerge(merged, plan)
    assert torch.equal(copies, copies.gather(1, parent.unsqueeze(-1).expand_as(x)))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(average_tokens(copies, size, plan)[0], merged, rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [300, 513, 577])
def test_half_precision_tokens_are_summed_in_float32(count):
    x = (tokens(1, count, 16) + 3).bfloat16()
    merged, total = average_tokens(x, torch.ones(1, count), make_plan(torch.zeros(1, count).long(), 1))
    assert (merged.dtype, total.item()) == (torch.bfloat16, count)
    assert torch.equal(merged[:, 0], x.double().mean(1).bfloat16())


@pytest.mark.parametrize("batch", [1, 3])
def test_no_tokens_merge_into_none(batch):
    plan = make_plan(torch.zeros(batch, 0).long(), 0)
    merged, total = average_tokens(torch.zeros(batch, 0, 4), torch.ones(batch, 0), plan)
    assert (merged.shape, total.shape) == ((batch, 0, 4), (batch, 0))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_token_by_its_share(method):
    x, size = pairs(20, torch.float32)
    plan = make_plan(decide(x, 12, method).parent, 8)
    merged, total = average_tokens(x.requires_grad_(), size, plan)
    merged.sum().backward()
    share = size / total.gather(1, plan.slot)
    torch.testing.assert_close(x.grad, share.unsqueeze(-1).expand_as(x))


def test_gradients_pass_the_numerical_check_and_functional_transforms():
    x, size = tokens(2, 6, dtype=EXACT), sizes(2, 6).double()
    plan = make_plan(parents(x, 3), 3)
    found = torch.func.grad(lambda t: average_tokens(t, size, plan)[0].sum())(x)
    leaf = x.clone().requires_grad_()
    average_tokens(leaf, size, plan)[0].sum().backward()
    assert torch.equal(found, leaf.grad)
    assert torch.autograd.gradcheck(lambda t: unmerge(average_tokens(t, size, plan)[0], plan), (leaf,))


# The size bias of proportional attention


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_bias_is_the_log_of_the_size_as_an_additive_mask(dtype):
    size = torch.tensor([[1.0, 2.0, 8.0]])
    bias = log_size_bias(size, dtype)
    assert (bias.shape, bias.dtype) == ((1, 1, 1, 3), dtype)
    torch.testing.assert_close(bias[0, 0].double().exp(), size.double(), rtol=1e-2, atol=0)


def test_the_size_bias_counts_a_token_as_often_as_it_stands_for_patches():
    query, keys, size = torch.randn(1, 1, 4), torch.randn(1, 3, 4), torch.tensor([[1.0, 3.0, 2.0]])
    repeated = keys.repeat_interleave(size[0].long(), 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    found = attention(query, keys, keys, attn_mask=log_size_bias(size, torch.float32)[:, 0])
    torch.testing.assert_close(found, attention(query, repeated, repeated))


# Reduction by decisions of every kind

KINDS = [
    ("pitome", {}), ("tofu", {"depth": 0.0}), ("tofu", {"depth": 0.9}), ("diffrate", {}), ("sparsevlm", {}),
    ("dct", {}), ("prumerge", {"neighbours": 4}), ("fastv", {}), ("divprune", {}), ("visionzip", {}),
]  # fmt: skip
every_kind = pytest.mark.parametrize("method, parameters", KINDS)
weighted_or_not = pytest.mark.parametrize("weighted", [True, False])


@weighted_or_not
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plain_decision_is_reduced_by_averages(weighted, dtype):
    x, size = pairs(20, dtype)
    parent = parents(x, 9)
    plan = make_plan(parent, 11)
    merged, total = reduce_tokens(x, size, plan, MergeResult(parent), weighted)
    assert torch.equal(merged, average_tokens(x, size if weighted else torch.ones_like(size), plan)[0])
    assert torch.equal(total, average_tokens(x, size, plan)[1])


@weighted_or_not
@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*MIXING, *PRUNING, "tofu")])
def test_reduction_conserves_the_sum_of_weighted_tokens(method, count, remove, weighted):
    x, size = pairs(count)
    result = decide(x, remove, method)
    plan = make_plan(result.parent, count - remove)
    merged, total = reduce_tokens(x, size, plan, result, weighted)
    weight = torch.ones_like(size) if result.weight is None else result.weight
    assert torch.equal(total.sum(1), (size * weight).sum(1))
    counted = (size if weighted else torch.ones_like(size)) * weight
    _, held = average_tokens(x, counted, plan)
    before, after = ((t * s[..., None]).sum(1) for t, s in ((x, counted), (merged, held)))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


@weighted_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_dropped_tokens_count_nowhere(method, parameters, weighted, dtype):
    x, size = pairs(20, dtype)
    result = decide(x, 9, method, **parameters)
    plan = make_plan(result.parent, 11)
    dropped = ~kept(result.parent) if result.prunes else torch.zeros(2, 20, dtype=torch.bool)
    if result.weight is not None:
        dropped = result.weight == 0
    if result.mixing is not None:
        dropped = (result.mixing == 0).all(1).expand(2, -1)
    one, total = reduce_tokens(x, size, plan, result, weighted)
    other, after = reduce_tokens(x.masked_fill(dropped[..., None], 99.0), size, plan, result, weighted)
    assert one.dtype == dtype
    assert torch.equal(one, other)
    assert torch.equal(total, after)
    if result.mixing is None:
        assert torch.equal(total.sum(1), size.masked_fill(dropped, 0).sum(1))


@pytest.mark.parametrize("weighted, expected", [(True, (0.5 * 2 * 1 + 7) / 2), (False, (0.5 * 1 + 7) / 1.5)])
def test_weights_multiply_sizes(weighted, expected):
    x, size = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]]), torch.tensor([[2.0, 1.0, 1.0, 5.0]])
    result = MergeResult(torch.tensor([[2, 1, 2, 2]]), weight=torch.tensor([[0.5, 1.0, 1.0, 0.0]]))
    merged, total = reduce_tokens(x, size, make_plan(result.parent, 2), result, weighted)
    assert merged.flatten().tolist() == [4.0, pytest.approx(expected)]
    assert total.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("batch", [1, 2])
def test_mixing_makes_linear_combinations(batch):
    x, size = pairs(4)
    mixing = torch.rand(batch, 2, 4, generator=torch.Generator().manual_seed(1))
    result = MergeResult(torch.tensor([[1, 1, 1, 3]]).repeat(2, 1), mixing=mixing)
    merged, total = reduce_tokens(x, size, make_plan(result.parent, 2), result)
    torch.testing.assert_close(merged, torch.stack([mixing[b % batch].double() @ x[b] for b in range(2)]))
    assert torch.equal(total, torch.stack([size[:, :3].sum(1), size[:, 3]], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_keeps_tokens_and_their_sizes_unchanged(dtype):
    x, size = pairs(12, dtype)
    result = decide(x, 7, "fastv")
    merged, total = reduce_tokens(x, size, make_plan(result.parent, 5), result)
    assert torch.equal(merged, x[kept(result.parent)].view(2, 5, -1))
    assert torch.equal(total, size[kept(result.parent)].view(2, 5))


@weighted_or_not
@pytest.mark.parametrize("count, remove", SIZES)
def test_kept_norms_equal_the_oracle(count, remove, weighted):
    x, size = pairs(count)
    result = MergeResult(parents(x, remove, "tome"), keeps_norm=True)
    merged, _ = reduce_tokens(x, size, make_plan(result.parent, count - remove), result, weighted)
    for b, parent in enumerate(result.parent.tolist()):
        groups = [[j for j in range(count) if parent[j] == k] for k in sorted(set(parent))]
        counts = size[b] if weighted else torch.ones(count)
        expected = [oracle.mlerp(x[b, group].tolist(), counts[group].tolist()) for group in groups]
        torch.testing.assert_close(merged[b], torch.tensor(expected, dtype=EXACT))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_norms_change_no_bit_where_nothing_was_averaged(dtype):
    x, size = pairs(20, dtype)
    plain = MergeResult(parents(x, 6, "tome"), weight=torch.ones(2, 20))
    plain.weight[0] = kept(plain.parent)[0].float()  # the first image's removed tokens are dropped
    plan = make_plan(plain.parent, 14)
    one, other = (reduce_tokens(x, size, plan, r)[0] for r in (plain, plain._replace(keeps_norm=True)))
    single = torch.zeros(2, 14).scatter_add(1, plan.slot, plain.weight) == 1
    assert single[0].all() and not single[1].all()
    assert torch.equal(one[single], other[single])
    assert not torch.isclose(one[~single], other[~single]).all(1).any()


def test_norms_are_kept_beside_zero_tokens_but_not_where_tokens_cancel():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    x.requires_grad_()
    result = MergeResult(torch.tensor([[0, 0, 2, 2, 4, 4]]), keeps_norm=True)
    merged, _ = reduce_tokens(x, torch.ones(1, 6), make_plan(result.parent, 3), result)
    assert merged.tolist() == [[[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]]
    merged.sum().backward()
    assert x.grad.isfinite().all()


@every_kind
def test_half_precision_is_reduced_in_float32(method, parameters):
    x, length = (tokens(1, 300, 16) + 3).bfloat16(), 20 if METHODS[method].needs else 150
    result = decide(x, 300 - length, method, **parameters)
    plan = make_plan(result.parent, length)
    found, exact = (reduce_tokens(t, torch.ones(1, 300), plan, result)[0] for t in (x, x.double()))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once


@weighted_or_not
@every_kind
def test_gradients_of_a_reduction_pass_the_numerical_check(method, parameters, weighted):
    x, size = tokens(2, 8, dtype=EXACT), sizes(2, 8).double()
    result = decide(x, 3, method, **parameters)
    plan = make_plan(result.parent, 5)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: reduce_tokens(t, size, plan, result, weighted)[0], (x,))


@pytest.mark.parametrize("grad", [False, True])
@every_kind
def test_autocast_does_not_reach_a_reduction(method, parameters, grad):
    x, size = pairs(20, torch.float32)
    result = decide(x, 9, method, **parameters)
    plan = make_plan(result.parent, 11)
    expected, _ = reduce_tokens(x.requires_grad_(grad), size, plan, result)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = reduce_tokens(x, size, plan, result)
    assert torch.equal(found, expected)
