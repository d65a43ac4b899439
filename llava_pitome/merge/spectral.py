"""The spectral distance between a token graph and its merged graph (PiToMe, eq. 5 and Theorem 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def spectral_distance(features: Tensor, parent: Tensor) -> Tensor:
    """Returns the L1 distance (B,) between the Laplacian eigenvalues of the token graph and the merged graph.

    The graph has the edges W[i, j] = 1 - cos(i, j) (eq. 3). Merging averages the edges between two groups;
    the merged graph is lifted back to N nodes, so that both have N eigenvalues.

    Args:
        features: (B, N, D) one vector per token.
        parent: (B, N) the token each token merges into.

    Raises:
        ValueError: the shapes do not match.
    """
    if features.ndim != 3 or parent.shape != features.shape[:2]:
        raise ValueError(
            f"features {tuple(features.shape)} and parent {tuple(parent.shape)} must be (B, N, D) and (B, N)"
        )
    unit = F.normalize(features.double(), dim=-1)
    edges = (1 - unit @ unit.transpose(1, 2)).clamp_min(0)  # (B, N, N)
    same_group = (parent.unsqueeze(2) == parent.unsqueeze(1)).double()  # (B, N, N)
    average = same_group / same_group.sum(-1, keepdim=True)
    lifted = average @ edges @ average.transpose(1, 2)
    return (_spectrum(edges) - _spectrum(lifted)).abs().sum(-1)


def _spectrum(edges: Tensor) -> Tensor:
    """Returns the eigenvalues (B, N), ascending, of the normalised Laplacian I - D^-1/2 W D^-1/2."""
    scale = edges.sum(-1).clamp_min(1e-300).rsqrt()
    laplacian = torch.eye(edges.shape[1], dtype=edges.dtype, device=edges.device) - (
        scale.unsqueeze(2) * edges * scale.unsqueeze(1)
    )
    return torch.linalg.eigvalsh(laplacian)
