"""Which patches became one token: a picture with each token's patches in one colour."""

import numpy as np
from PIL import Image
from torch import Tensor

EDGE = (255, 255, 255)
FAINT = 0.3  # strength of a line between two patches that are tokens of their own
DARK = 0.25  # brightness of patches that were dropped


def overlay(
    picture: Image.Image,
    slot: Tensor,
    step: int = 32,
    grid: tuple[int, int] | None = None,
    dropped: Tensor | None = None,
) -> Image.Image:
    """The picture with the patches of every token in their mean colour, and a line between tokens.

    A patch that is a token of its own is shown as it is; one that was dropped is dark.

    Args:
        picture: as the tower sees it: a whole number of patches high and wide.
        slot: (N,) the token that each patch ended up in, in raster order.
        step: screen pixels across a patch.
        grid: rows and columns of patches; None: a square.
        dropped: (N,) True for patches that left nothing behind.

    Raises:
        ValueError: N patches are no such grid, or the picture is not a whole number of them.
    """
    rows, columns = shape(len(slot), grid)
    if picture.width % columns or picture.height % rows:
        raise ValueError(
            f"{rows} x {columns} patches do not tile a picture of {picture.width} x {picture.height} pixels"
        )
    picture = picture.convert("RGB")
    gone = np.zeros(len(slot), bool) if dropped is None else dropped.cpu().numpy()
    token = np.where(gone, -1, slot.cpu().numpy())
    tiles = np.asarray(picture, np.float64).reshape(rows, picture.height // rows, columns, -1, 3)
    large = picture.resize((columns * step, rows * step), Image.Resampling.BICUBIC)
    shown = np.asarray(large, np.float64).reshape(rows, step, columns, step, 3)
    flat, alone = _means(tiles.mean((1, 3)).reshape(-1, 3), token)
    painted = np.where(_patchwise(alone, rows), shown, _patchwise(flat, rows))
    painted = np.where(_patchwise(gone, rows), shown * DARK, painted)
    return framed(painted, token, EDGE, alone & ~gone)


def shape(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of `count` patches.

    Raises:
        ValueError: they are not as many as `grid` says, or no square where it is None.
    """
    rows, columns = grid or (round(count**0.5),) * 2
    if rows * columns != count:
        raise ValueError(f"{count} patches are no grid of {rows} x {columns}")
    return rows, columns


def framed(
    painted: np.ndarray, token: np.ndarray, colour: tuple[int, int, int], faint: np.ndarray | None = None
) -> Image.Image:
    """A painting (rows, step, columns, step, 3) with a line between patches of different tokens.

    Args:
        painted: what is to be seen, 0 to 255.
        token: (N,) the token of each patch.
        colour: of the lines.
        faint: (N,) patches between two of which a line is hardly to be seen; None: none are.
    """
    rows, step, columns = painted.shape[:3]
    token = token.reshape(rows, columns)
    hidden = np.zeros(token.shape, bool) if faint is None else faint.reshape(rows, columns)
    line = np.zeros(painted.shape[:4])
    thick = max(step // 8, 1)  # pixels across a line, most of them below or right of the border
    above = thick // 2
    down = _strength(token[:-1] != token[1:], hidden[:-1] & hidden[1:])[:, None, :, None]
    right = _strength(token[:, :-1] != token[:, 1:], hidden[:, :-1] & hidden[:, 1:])[:, None, :, None]
    line[:-1, step - above :] = down
    line[1:, : thick - above] = down
    line[:, :, :-1, step - above :] = np.maximum(line[:, :, :-1, step - above :], right)
    line[:, :, 1:, : thick - above] = np.maximum(line[:, :, 1:, : thick - above], right)
    painted = painted + line[..., None] * (np.array(colour, float) - painted)
    return Image.fromarray(painted.round().astype(np.uint8).reshape(rows * step, columns * step, 3))


def _strength(border: np.ndarray, faint: np.ndarray) -> np.ndarray:
    """How strong the line between two patches is, 0 to 1."""
    return border * np.where(faint, FAINT, 1.0)


def _means(colours: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean colour (N, 3) of the patches of each patch's token, and whether it is alone in it (N,)."""
    _, index, count = np.unique(token, return_inverse=True, return_counts=True)
    total = np.zeros((len(count), 3))
    np.add.at(total, index, colours)
    return (total / count[:, None])[index], (count == 1)[index]


def _patchwise(said: np.ndarray, rows: int) -> np.ndarray:
    """What is said of each patch (N, ...), as it stands beside (rows, step, columns, step, 3)."""
    return said.reshape(rows, 1, -1, 1, said.size // len(said))
