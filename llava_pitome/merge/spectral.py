"""How much of a token graph's spectrum a merge keeps: the paper's eq. 5 and Theorem 1."""

import torch
from torch import Tensor
from torch.nn import functional as F


def spectral_distance(features: Tensor, parent: Tensor) -> Tensor:
    """L1 distance (B,) between Laplacian eigenvalues of the token graph and the merged one.

    The graph has the edges W[i, j] = 1 - cos(i, j) (eq. 3). Merging averages the edges between two groups;
    the merged graph is lifted back to N nodes, so that both have N eigenvalues.

    Args:
        features: (B, N, D) one vector a token.
        parent: (B, N) the token each token folds into, of one merge.

    Raises:
        ValueError: shapes that do not fit.
    """
    if features.ndim != 3 or parent.shape != features.shape[:2]:
        raise ValueError(
            f"features {tuple(features.shape)} and parent {tuple(parent.shape)} must be (B, N, D) and (B, N)"
        )
    unit = F.normalize(features.double(), dim=-1)
    edges = (1 - unit @ unit.transpose(1, 2)).clamp_min(0)  # (B, N, N)
    together = (
        parent.unsqueeze(2) == parent.unsqueeze(1)
    ).double()  # (B, N, N) who is in one group with whom
    average = together / together.sum(-1, keepdim=True)
    lifted = average @ edges @ average.transpose(1, 2)
    return (_spectrum(edges) - _spectrum(lifted)).abs().sum(-1)


def _spectrum(edges: Tensor) -> Tensor:
    """Eigenvalues (B, N), rising, of the normalised Laplacian I - D^-1/2 W D^-1/2."""
    scale = edges.sum(-1).clamp_min(1e-300).rsqrt()
    laplacian = torch.eye(edges.shape[1], dtype=edges.dtype, device=edges.device) - (
        scale.unsqueeze(2) * edges * scale.unsqueeze(1)
    )
    return torch.linalg.eigvalsh(laplacian)
