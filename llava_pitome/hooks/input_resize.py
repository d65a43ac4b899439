"""Lower input resolution, the baseline that merges nothing: images are resized before the vision tower."""

from torch import Tensor
from torch.nn import functional as F


def resize_images(pixels: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Images (I, 3, H, W) resized to `grid` rows and columns of patches, bicubic with antialiasing."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    small = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return small.to(pixels.dtype)
