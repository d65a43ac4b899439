"""Lower input resolution: a picture is shrunk in front of the tower. The control that merges nothing."""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle


class InputResizeHook:
    """The hook on a tower that shrinks the pictures it is given to fewer patches."""

    def __init__(self, tower: nn.Module, patch_size: int, grid: tuple[int, int]):
        """Prepares the hook.

        Args:
            tower: called with pixel_values (I, 3, H, W); interpolates its position embeddings when asked to.
            patch_size: pixels across one patch.
            grid: rows and columns of patches to shrink to.
        """
        self.tower, self.size = tower, (grid[0] * patch_size, grid[1] * patch_size)
        self._handle: RemovableHandle | None = None

    def install(self) -> None:
        """Registers the hook."""
        self._handle = self.tower.register_forward_pre_hook(self._shrink, with_kwargs=True)

    def remove(self) -> None:
        """Takes it off."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _shrink(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        pixels = args[0] if args else kwargs["pixel_values"]
        smaller = self.smaller(pixels)
        kwargs = kwargs | {"interpolate_pos_encoding": True}
        return ((smaller, *args[1:]), kwargs) if args else (args, kwargs | {"pixel_values": smaller})

    def smaller(self, pixels: Tensor) -> Tensor:
        """Pictures (I, 3, H, W) at the size that the tower is given."""
        small = F.interpolate(pixels.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        return small.to(pixels.dtype)
