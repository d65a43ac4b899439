from itertools import pairwise

import pytest
import torch
from given import decide, tokens

from llava_pitome import METHODS, parents, spectral_distance

SPREADS = (0.1, 0.03, 0.01, 0.003, 0.001)


def clusters(spread, seed=0):
    """Returns tokens (1, 32, 16) in clusters of 6, 10, 4 and 12 around orthogonal directions, and clusters.

    Even positions hold two of the clusters, odd positions the other two: ToMe can only merge across clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.zeros(32, dtype=torch.int64)
    cluster[0::2] = torch.tensor([0] * 6 + [1] * 10)
    cluster[1::2] = torch.tensor([2] * 4 + [3] * 12)
    noise = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    return (torch.eye(16, dtype=torch.float64)[cluster] + spread * noise)[None], cluster


def mean_distance(method, spread):
    x = torch.cat([clusters(spread, seed)[0] for seed in range(4)])
    return spectral_distance(x, parents(x, 8, method)).mean().item()


def test_pitomes_distance_vanishes_as_clusters_tighten_and_tomes_does_not():
    pitome, tome = ([mean_distance(method, spread) for spread in SPREADS] for method in ("pitome", "tome"))
    assert all(later < earlier for earlier, later in pairwise(pitome))
    assert pitome[-1] < 1e-2 * pitome[0]
    assert min(tome) > 0.1
    assert pitome[-1] < 1e-3 * tome[-1]


@pytest.mark.parametrize("method, within", [("pitome", True), ("tome", False)])
def test_pitome_merges_within_clusters_and_tome_across(method, within):
    x, cluster = clusters(SPREADS[-1])
    parent = parents(x, 8, method)[0]
    gone = parent != torch.arange(32)
    assert torch.all((cluster[parent[gone]] == cluster[gone]) == within)


def test_the_distance_equals_the_one_of_the_graph_written_out():
    x, _ = clusters(0.3)
    parent, n = parents(x, 8)[0].tolist(), 32
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    edges = [[max(0.0, float(1 - unit[i] @ unit[j])) for j in range(n)] for i in range(n)]
    groups = [[j for j in range(n) if parent[j] == parent[i]] for i in range(n)]

    def mean_edge(i, j):
        return sum(edges[u][v] for u in groups[i] for v in groups[j]) / len(groups[i]) / len(groups[j])

    def spectrum(w):
        degree = [sum(row) for row in w]
        rows = [[(i == j) - w[i][j] / (degree[i] * degree[j]) ** 0.5 for j in range(n)] for i in range(n)]
        return torch.linalg.eigvalsh(torch.tensor(rows, dtype=torch.float64))

    lifted = [[mean_edge(i, j) for j in range(n)] for i in range(n)]
    expected = (spectrum(edges) - spectrum(lifted)).abs().sum()
    torch.testing.assert_close(spectral_distance(x, parents(x, 8))[0], expected)


def test_merging_nothing_has_no_distance():
    x, _ = clusters(0.1)
    assert spectral_distance(x, torch.arange(32)[None]).item() == 0


@pytest.mark.parametrize("method", METHODS)
def test_merging_equal_pairs_has_no_distance_and_every_method_has_one(method):
    x = tokens(1, 8, 6).repeat_interleave(2, 1)
    assert spectral_distance(x, torch.arange(16)[None] // 2 * 2).item() == pytest.approx(0, abs=1e-6)
    assert spectral_distance(x, decide(x, 4, method).parent).item() >= 0


def test_images_of_a_batch_have_their_own_distances():
    x = torch.cat([clusters(0.1, seed)[0] for seed in range(3)])
    parent = parents(x, 8)
    alone = [spectral_distance(x[b : b + 1], parent[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(spectral_distance(x, parent), torch.cat(alone))


@pytest.mark.parametrize("features, parent", [((4, 3), (4, 3)), ((1, 4, 3), (4,)), ((1, 4, 3), (1, 5))])
def test_shapes_that_do_not_match_raise(features, parent):
    with pytest.raises(ValueError, match="must be"):
        spectral_distance(torch.zeros(features), torch.zeros(parent, dtype=torch.int64))
