import oracle
import pytest
import torch
from given import given

from llava_pitome import METHODS, parents
from llava_pitome.merge.plan import (
    add_prefix_tokens,
    average_tokens,
    compose,
    log_size_bias,
    make_plan,
    trace,
    unmerge,
    without_prefix_tokens,
)
from llava_pitome.merge.reduce import MergeResult, reduce_tokens
from llava_pitome.methods.registry import choose

SIZES = ((6, 2), (17, 8), (36, 3), (49, 40))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-1, torch.float64: 1e-10}


def tokens(count, dtype=torch.float64, seed=0):
    return torch.randn(2, count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def sizes(count, seed=0):
    return torch.randint(1, 9, (2, count), generator=torch.Generator().manual_seed(seed)).float()


def found(x, remove, method):
    """Parents by a method that is given what it needs."""
    return parents(x, remove, method, **given(method, *x.shape, x.dtype))


def choice_of(x, remove, method, **parameters):
    """The whole choice of such a method."""
    return choose(x, remove, method, **given(method, *x.shape, x.dtype), **parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_the_sum_of_size_times_token_is_conserved(method, count, remove, dtype):
    x, size = tokens(count, dtype), sizes(count)
    merged, total = average_tokens(x, size, make_plan(found(x, remove, method), count - remove))
    assert merged.dtype == dtype
    assert merged.shape == (2, count - remove, 8)
    before = (x.double() * size.double()[..., None]).sum(1)
    after = (merged.double() * total.double()[..., None]).sum(1)
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_sizes_add_up_to_the_patches(method, count, remove):
    x = tokens(count)
    _, total = average_tokens(x, torch.ones(2, count), make_plan(found(x, remove, method), count - remove))
    assert total.shape == (2, count - remove)
    assert total.min() >= 1
    assert total.sum(1).tolist() == [count, count]


@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_survivors_keep_raster_order(method, count, remove):
    parent = found(tokens(count), remove, method)
    laid = make_plan(parent, count - remove)
    for slots, row in zip(laid.slot, parent):
        kept = torch.arange(count)[row == torch.arange(count)]
        assert slots[kept].tolist() == list(range(count - remove))
        assert torch.equal(slots, slots[row])


def test_another_order_lays_survivors_out_as_it_ranks_them():
    parent = torch.tensor([[0, 0, 2, 4, 4]])
    laid = make_plan(parent, 3, order=torch.tensor([[4, 0, 2, 1, 3]]))
    assert laid.slot.tolist() == [[2, 2, 0, 1, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_nothing_changes_no_bit(dtype):
    x, size = tokens(12, dtype), sizes(12)
    merged, total = average_tokens(x, size, make_plan(parents(x, 0), 12))
    assert torch.equal(merged, x)
    assert torch.equal(total, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_token_that_stays_alone_changes_no_bit(method, dtype):
    x, size = tokens(20, dtype), sizes(20)
    parent = found(x, 6, method)
    laid = make_plan(parent, 14)
    merged, total = average_tokens(x, size, laid)
    for b in range(2):
        alone = [i for i in range(20) if (parent[b] == parent[b, i]).sum() == 1]
        assert alone
        assert torch.equal(merged[b, laid.slot[b, alone]], x[b, alone])
        assert torch.equal(total[b, laid.slot[b, alone]], size[b, alone])


def test_a_merged_token_is_the_average_weighted_by_size():
    x, size = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]]), torch.tensor([[2.0, 1.0, 1.0, 5.0]])
    merged, total = average_tokens(x, size, make_plan(torch.tensor([[2, 1, 2, 2]]), 2))
    assert merged.flatten().tolist() == pytest.approx([4.0, (2 * 1 + 1 * 7 + 5 * 9) / 8])
    assert total.tolist() == [[1.0, 8.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_unmerged_tokens_are_equal_within_a_group_and_merge_to_themselves(method, dtype):
    x, size = tokens(20, dtype), sizes(20)
    parent = found(x, 12, method)
    laid = make_plan(parent, 8)
    merged, _ = average_tokens(x, size, laid)
    back = unmerge(merged, laid)
    assert back.shape == x.shape
    assert torch.equal(back, back.gather(1, parent.unsqueeze(-1).expand_as(back)))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(average_tokens(back, size, laid)[0], merged, rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [300, 513, 577])
def test_half_precision_tokens_are_summed_in_float32(count):
    x = (torch.randn(1, count, 16, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    laid = make_plan(torch.zeros(1, count, dtype=torch.int64), 1)
    merged, total = average_tokens(x, torch.ones(1, count), laid)
    assert merged.dtype == torch.bfloat16
    assert total.item() == count
    assert torch.equal(merged[:, 0], x.double().mean(1).bfloat16())


def merges(count, removes):
    """Merges one after the other, and their parents as lists."""
    x, size, plans, lists = tokens(count), torch.ones(2, count), [], []
    for remove in removes:
        parent = parents(x, remove)
        plans.append(make_plan(parent, x.shape[1] - remove))
        lists.append(parent.tolist())
        x, size = average_tokens(x, size, plans[-1])
    return plans, lists, x, size


def test_the_trace_is_what_a_plain_python_oracle_follows():
    plans, lists, _, size = merges(30, (10, 3, 8))
    found = trace(plans)
    for b in range(2):
        where = list(range(30))
        for parent in (rows[b] for rows in lists):
            kept = [i for i, p in enumerate(parent) if p == i]
            where = [kept.index(parent[w]) for w in where]
        assert found[b].tolist() == where
        assert torch.bincount(found[b], minlength=9).tolist() == size[b].tolist()


def test_the_trace_of_one_merge_is_its_slots():
    plans, *_ = merges(12, (5,))
    assert torch.equal(trace(plans), plans[0].slot)


def test_the_trace_finds_the_average_of_every_patch():
    plans, _, x, _ = merges(30, (10, 3, 8))
    start, last = tokens(30), trace(plans)
    for b in range(2):
        for token in range(9):
            torch.testing.assert_close(x[b, token], start[b, last[b] == token].mean(0))


def test_there_is_no_trace_of_no_merge():
    with pytest.raises(ValueError, match="no merge to trace"):
        trace([])


def test_two_merges_compose_into_one():
    x, size = tokens(20), torch.ones(2, 20)
    first = parents(x, 8)
    laid = make_plan(first, 12)
    middle, sizes_ = average_tokens(x, size, laid)
    second = parents(middle, 5, "tome")
    expected, total = average_tokens(middle, sizes_, make_plan(second, 7))
    both = compose(second, laid)
    assert torch.equal(both.gather(1, both), both)
    found, counted = average_tokens(x, size, make_plan(both, 7))
    torch.testing.assert_close(found, expected)
    assert torch.equal(counted, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_bias_is_the_log_of_the_size_as_an_additive_mask(dtype):
    bias = log_size_bias(torch.tensor([[1.0, 2.0, 8.0]]), dtype)
    assert bias.shape == (1, 1, 1, 3)
    assert bias.dtype == dtype
    torch.testing.assert_close(
        bias.flatten().double().exp(), torch.tensor([1.0, 2.0, 8.0]).double(), rtol=1e-2, atol=0
    )


def test_the_size_bias_counts_a_token_as_often_as_it_stands_for_patches():
    query, keys = torch.randn(1, 1, 4), torch.randn(1, 3, 4)
    size = torch.tensor([[1.0, 3.0, 2.0]])
    repeated = keys.repeat_interleave(size[0].long(), 1)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(query, repeated, repeated)
    found = attention(query, keys, keys, attn_mask=log_size_bias(size, torch.float32)[:, 0])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_to_every_token_by_its_share(method):
    x, size = tokens(20, torch.float32).requires_grad_(), sizes(20)
    laid = make_plan(found(x.detach(), 12, method), 8)
    merged, total = average_tokens(x, size, laid)
    merged.sum().backward()
    share = size / total.gather(1, laid.slot)
    torch.testing.assert_close(x.grad, share.unsqueeze(-1).expand_as(x))


def test_gradients_pass_the_numerical_check():
    x, size = tokens(6).requires_grad_(), sizes(6).double()
    laid = make_plan(parents(x.detach(), 3), 3)
    assert torch.autograd.gradcheck(lambda t: unmerge(average_tokens(t, size, laid)[0], laid), (x,))


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_does_not_reach_the_sums(grad):
    x, size = tokens(20, torch.float32).requires_grad_(grad), sizes(20)
    laid = make_plan(parents(x.detach(), 9), 11)
    expected, _ = average_tokens(x, size, laid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = average_tokens(x, size, laid)
    assert torch.equal(found, expected)


def test_functional_gradients_pass_through():
    x, size = tokens(8), sizes(8)
    laid = make_plan(parents(x, 3), 5)
    found = torch.func.grad(lambda t: average_tokens(t, size, laid)[0].sum())(x)
    leaf = x.clone().requires_grad_()
    average_tokens(leaf, size, laid)[0].sum().backward()
    assert torch.equal(found, leaf.grad)


@pytest.mark.parametrize("batch", [1, 3])
def test_no_tokens_at_all_merge_into_none(batch):
    merged, total = average_tokens(
        torch.zeros(batch, 0, 4), torch.ones(batch, 0), make_plan(torch.zeros(batch, 0).long(), 0)
    )
    assert (merged.shape, total.shape) == ((batch, 0, 4), (batch, 0))


def test_a_plan_with_tokens_in_front_is_the_plan_behind_them():
    parent = parents(tokens(12), 4)
    wide, plain = make_plan(add_prefix_tokens(parent, 1), 9), make_plan(parent, 8)
    assert wide.slot[:, 0].tolist() == [0, 0]
    for found, expected in zip(without_prefix_tokens(wide, 1), plain):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


FOLDED = [  # a choice of every kind
    ("pitome", {}), ("tofu", {"depth": 0.0}), ("tofu", {"depth": 0.9}), ("diffrate", {}), ("sparsevlm", {}),
    ("dct", {}), ("prumerge", {"neighbours": 4}), ("fastv", {}), ("divprune", {}), ("visionzip", {}),
]  # fmt: skip
WAYS = [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_a_choice_without_more_to_say_folds_as_a_merge(method, weighted, dtype):
    x, size = tokens(20, dtype), sizes(20)
    laid = make_plan(found(x, 12, method), 8)
    merged, total = reduce_tokens(x, size, laid, MergeResult(laid.kept.gather(1, laid.slot)), weighted)
    expected, _ = average_tokens(x, size if weighted else torch.ones_like(size), laid)
    assert torch.equal(merged, expected)
    assert torch.equal(total, average_tokens(x, size, laid)[1])


@pytest.mark.parametrize("weighted", WAYS)
@pytest.mark.parametrize("count, remove", SIZES)
@pytest.mark.parametrize("method", [m for m, f in METHODS.items() if not (f.mixed or f.keeps_norm or f.kept)])
def test_the_sum_of_what_counts_is_conserved(method, count, remove, weighted):
    x, size = tokens(count), sizes(count)
    choice = choice_of(x, remove, method)
    laid = make_plan(choice.parent, count - remove)
    merged, total = reduce_tokens(x, size, laid, choice, weighted)
    weight = torch.ones_like(size) if choice.weight is None else choice.weight
    assert torch.equal(total.sum(1), (size * weight).sum(1))
    tally = size if weighted else torch.ones_like(size)
    held = average_tokens(x, tally * weight, laid)[1]  # by what the averages were weighted
    torch.testing.assert_close(
        (merged * held[..., None]).sum(1), (x * (tally * weight)[..., None]).sum(1), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", WAYS)
@pytest.mark.parametrize("method, parameters", FOLDED)
def test_what_is_dropped_counts_nothing(method, parameters, weighted, dtype):
    x, size = tokens(20, dtype), sizes(20)
    choice = choice_of(x, 9, method, **parameters)
    laid = make_plan(choice.parent, 11)
    dropped = torch.zeros(2, 20, dtype=torch.bool)
    if choice.weight is not None:
        dropped = choice.weight == 0
    elif choice.prunes:
        dropped = choice.parent != torch.arange(20)
    elif choice.mixing is not None:
        dropped = (choice.mixing == 0).all(1).expand(2, -1)
    one, total = reduce_tokens(x, size, laid, choice, weighted)
    other, after = reduce_tokens(x.masked_fill(dropped[..., None], 99.0), size, laid, choice, weighted)
    assert torch.equal(one, other)
    assert torch.equal(total, after)
    assert one.dtype == dtype
    if choice.mixing is None:
        assert torch.equal(total.sum(1), size.masked_fill(dropped, 0).sum(1))
        assert (
            dropped.any() == (METHODS[method].kept is not None or choice.weight is not None)
            or method == "tofu"
        )


def test_weights_are_shares_of_an_average():
    x, size = torch.tensor([[[1.0], [4.0], [7.0], [9.0]]]), torch.tensor([[2.0, 1.0, 1.0, 5.0]])
    choice = MergeResult(torch.tensor([[2, 1, 2, 2]]), weight=torch.tensor([[0.5, 1.0, 1.0, 0.0]]))
    merged, total = reduce_tokens(x, size, make_plan(choice.parent, 2), choice)
    assert merged.flatten().tolist() == [4.0, (0.5 * 2 * 1 + 7) / 2]
    assert total.tolist() == [[1.0, 2.0]]
    merged, total = reduce_tokens(x, size, make_plan(choice.parent, 2), choice, size_weighted=False)
    assert merged.flatten().tolist() == [4.0, pytest.approx((0.5 * 1 + 7) / 1.5)]
    assert total.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mixing_says_what_survivors_are_made_of(batch):
    x, size = tokens(4), sizes(4)
    mixing = torch.rand(batch, 2, 4, generator=torch.Generator().manual_seed(1))
    choice = MergeResult(torch.tensor([[1, 1, 1, 3]]).repeat(2, 1), mixing=mixing)
    merged, total = reduce_tokens(x, size, make_plan(choice.parent, 2), choice)
    expected = torch.stack([mixing[b % batch].double() @ x[b] for b in range(2)])
    torch.testing.assert_close(merged, expected)
    assert torch.equal(total, torch.stack([size[:, :3].sum(1), size[:, 3]], 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_leaves_survivors_and_their_sizes_as_they_are(dtype):
    x, size = tokens(12, dtype), sizes(12)
    choice = choice_of(x, 7, "fastv")
    merged, total = reduce_tokens(x, size, make_plan(choice.parent, 5), choice)
    stays = choice.parent == torch.arange(12)
    assert torch.equal(merged, x[stays].view(2, 5, -1))
    assert torch.equal(total, size[stays].view(2, 5))


@pytest.mark.parametrize("weighted", WAYS)
@pytest.mark.parametrize("count, remove", SIZES)
def test_keeping_the_norm_is_what_a_plain_python_oracle_says(count, remove, weighted):
    x, size = tokens(count), sizes(count)
    choice = MergeResult(parents(x, remove, "tome"), keeps_norm=True)
    merged, _ = reduce_tokens(x, size, make_plan(choice.parent, count - remove), choice, weighted)
    for b, parent in enumerate(choice.parent.tolist()):
        for i, kept in enumerate(i for i in range(count) if parent[i] == i):
            group = [j for j in range(count) if parent[j] == kept]
            counts = [size[b, j].item() if weighted else 1 for j in group]
            expected = oracle.mlerp([x[b, j].tolist() for j in group], counts)
            torch.testing.assert_close(merged[b, i], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_the_norm_changes_no_bit_where_nothing_was_averaged(dtype):
    x, size = tokens(20, dtype), sizes(20)
    plain = MergeResult(parents(x, 6, "tome"), weight=torch.ones(2, 20))
    plain.weight[0] = (plain.parent[0] == torch.arange(20)).float()  # the first image's are dropped
    laid = make_plan(plain.parent, 14)
    one, other = (reduce_tokens(x, size, laid, c)[0] for c in (plain, plain._replace(keeps_norm=True)))
    single = (plain.weight.unsqueeze(1) * (laid.slot.unsqueeze(1) == torch.arange(14)[:, None])).sum(2) == 1
    assert single[0].all()
    assert not single[1].all()
    assert torch.equal(one[single], other[single])
    assert not torch.isclose(one[~single], other[~single]).all(1).any()


def test_a_norm_is_kept_beside_tokens_of_zeros_and_not_where_tokens_cancel_out():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    choice = MergeResult(torch.tensor([[0, 0, 2, 2]]), keeps_norm=True)
    merged, _ = reduce_tokens(x, torch.ones(1, 4), make_plan(choice.parent, 2), choice)
    assert merged.tolist() == [[[3.0, 4.0], [0.0, 0.0]]]


@pytest.mark.parametrize("method, parameters", FOLDED)
def test_half_precision_tokens_are_folded_in_float32(method, parameters):
    x = (torch.randn(1, 300, 16, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    choice = choice_of(x, 280 if METHODS[method].needs else 150, method, **parameters)
    length = 20 if METHODS[method].needs else 150
    laid = make_plan(choice.parent, length)
    found, _ = reduce_tokens(x, torch.ones(1, 300), laid, choice)
    exact, _ = reduce_tokens(x.double(), torch.ones(1, 300), laid, choice)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)  # rounded once


@pytest.mark.parametrize("weighted", WAYS)
@pytest.mark.parametrize("method, parameters", FOLDED)
def test_gradients_flow_through_every_kind_of_choice(method, parameters, weighted):
    x, size = tokens(8).requires_grad_(), sizes(8).double()
    choice = choice_of(x.detach(), 3, method, **parameters)
    laid = make_plan(choice.parent, 5)
    assert torch.autograd.gradcheck(lambda t: reduce_tokens(t, size, laid, choice, weighted)[0], (x,))


def test_gradients_of_a_kept_norm_are_finite_beside_tokens_of_zeros():
    x = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    x.requires_grad_()
    choice = MergeResult(torch.tensor([[0, 0, 2, 2, 4, 4]]), keeps_norm=True)
    reduce_tokens(x, torch.ones(1, 6), make_plan(choice.parent, 3), choice)[0].sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("method, parameters", FOLDED)
def test_autocast_does_not_reach_what_is_folded(method, parameters):
    x, size = tokens(20, torch.float32), sizes(20)
    choice = choice_of(x, 9, method, **parameters)
    laid = make_plan(choice.parent, 11)
    expected, _ = reduce_tokens(x, size, laid, choice)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = reduce_tokens(x, size, laid, choice)
    assert torch.equal(found, expected)
