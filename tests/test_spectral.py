from itertools import pairwise

import pytest
import torch
from given import given

from llava_pitome import METHODS, parents, spectral_distance

SPREADS = (0.1, 0.03, 0.01, 0.003, 0.001)


def clusters(spread, seed=0):
    """Tokens (1, 32, 16) in clusters of 6, 10, 4 and 12 around directions at right angles, and their cluster.

    Even positions hold two of the clusters, odd positions the other two: what ToMe merges, it merges across.
    """
    generator = torch.Generator().manual_seed(seed)
    centre = torch.zeros(32, dtype=torch.int64)
    centre[0::2] = torch.tensor([0] * 6 + [1] * 10)
    centre[1::2] = torch.tensor([2] * 4 + [3] * 12)
    directions = torch.eye(16, dtype=torch.float64)[:4]
    noise = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    return (directions[centre] + spread * noise)[None], centre


def distance(method, spread, remove=8):
    found = []
    for seed in range(4):
        x, _ = clusters(spread, seed)
        found.append(spectral_distance(x, parents(x, remove, method)).item())
    return sum(found) / len(found)


def test_pitomes_distance_falls_towards_zero_as_clusters_tighten_and_tomes_does_not():
    pitome, tome = ([distance(m, s) for s in SPREADS] for m in ("pitome", "tome"))
    assert all(later < earlier for earlier, later in pairwise(pitome))
    assert pitome[-1] < 1e-2 * pitome[0]
    assert min(tome) > 0.1
    assert pitome[-1] < 1e-3 * tome[-1]


def test_pitome_merges_within_clusters_and_tome_is_forced_across():
    x, centre = clusters(SPREADS[-1])
    for method, within in (("pitome", True), ("tome", False)):
        parent = parents(x, 8, method)[0]
        gone = parent != torch.arange(32)
        assert torch.all((centre[parent[gone]] == centre[gone]) == within), method


def test_the_lifted_spectrum_is_the_one_of_the_graph_written_out():
    x, _ = clusters(0.3)
    parent = parents(x, 8)[0].tolist()
    n, unit = 32, torch.nn.functional.normalize(x[0], dim=-1)
    edges = [[max(0.0, float(1 - unit[i] @ unit[j])) for j in range(n)] for i in range(n)]
    groups = [[j for j in range(n) if parent[j] == parent[i]] for i in range(n)]
    lifted = [
        [
            sum(edges[u][v] for u in groups[i] for v in groups[j]) / len(groups[i]) / len(groups[j])
            for j in range(n)
        ]
        for i in range(n)
    ]

    def spectrum(w):
        degree = [sum(row) for row in w]
        return torch.linalg.eigvalsh(
            torch.tensor(
                [[(i == j) - w[i][j] / (degree[i] * degree[j]) ** 0.5 for j in range(n)] for i in range(n)],
                dtype=torch.float64,
            )
        )

    expected = (spectrum(edges) - spectrum(lifted)).abs().sum()
    torch.testing.assert_close(spectral_distance(x, parents(x, 8))[0], expected)


@pytest.mark.parametrize("method", METHODS)
def test_merging_nothing_has_no_distance(method):
    x, _ = clusters(0.1)
    assert spectral_distance(x, parents(x, 0, method, **given(method, *x.shape))).item() == 0


@pytest.mark.parametrize("method", METHODS)
def test_merging_equal_tokens_has_no_distance(method):
    x = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)
    pairs = torch.arange(16)[None] // 2 * 2
    assert spectral_distance(x, pairs).item() == pytest.approx(0, abs=1e-6)
    assert spectral_distance(x, parents(x, 4, method, **given(method, *x.shape))).item() >= 0


def test_every_image_of_a_batch_has_its_own_distance():
    x = torch.cat([clusters(0.1, seed)[0] for seed in range(3)])
    parent = parents(x, 8)
    found = spectral_distance(x, parent)
    assert found.shape == (3,)
    for b in range(3):
        torch.testing.assert_close(found[b], spectral_distance(x[b : b + 1], parent[b : b + 1])[0])


@pytest.mark.parametrize("features, parent", [((4, 3), (4, 3)), ((1, 4, 3), (4,)), ((1, 4, 3), (1, 5))])
def test_shapes_that_do_not_fit_raise(features, parent):
    with pytest.raises(ValueError, match="must be"):
        spectral_distance(torch.zeros(features), torch.zeros(parent, dtype=torch.int64))
