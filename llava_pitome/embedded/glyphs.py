"""Characters of 5 x 7 dots, and text drawn with them at any scale."""

import numpy as np

ROWS, COLUMNS = 7, 5  # dots of a character; one more column between two
GLYPHS = {  # one byte per row
    "0": "0e11131519110e", "1": "040c040404040e", "2": "0e11010204081f", "3": "1f02040201110e",
    "4": "02060a121f0202", "5": "1f101e0101110e", "6": "0608101e11110e", "7": "1f010204080808",
    "8": "0e11110e11110e", "9": "0e11110f01020c", "A": "0e11111f111111", "B": "1e11111e11111e",
    "C": "0e11101010110e", "D": "1e11111111111e", "E": "1f10101e10101f", "F": "1f10101e101010",
    "G": "0e11101711110e", "H": "1111111f111111", "I": "0e04040404040e", "J": "0702020202120c",
    "K": "11121418141211", "L": "1010101010101f", "M": "111b1515111111", "N": "11191915131311",
    "O": "0e11111111110e", "P": "1e11111e101010", "R": "1e11111e141211", "S": "0f10100e01011e",
    "T": "1f040404040404", "U": "1111111111110e", "V": "11111111110a04", "W": "11111115151b11",
    "X": "11110a040a1111", "Y": "11110a04040404", "Z": "1f01020408101f",
}  # fmt: skip


def dots(text: str) -> np.ndarray:
    """The dots of a text: (7, 6 * length - 1) booleans."""
    rows = [np.frombuffer(bytes.fromhex(GLYPHS[c]), np.uint8) for c in text]
    columns = [np.pad(np.unpackbits(r[:, None], axis=1)[:, 3:], ((0, 0), (0, 1))) for r in rows]
    return np.concatenate(columns, 1)[:, :-1].astype(bool)


def extent(text: str, scale: float) -> tuple[int, int]:
    """Height and width in pixels of a text whose dots are `scale` pixels wide."""
    return int(np.ceil(ROWS * scale)), int(np.ceil(((COLUMNS + 1) * len(text) - 1) * scale))


def draw(text: str, scale: float) -> np.ndarray:
    """The share of each pixel that is ink: `extent` in [0, 1]."""
    bitmap, (height, width) = dots(text), extent(text, scale)
    rows = overlap(np.arange(height + 1), np.arange(bitmap.shape[0] + 1) * scale)
    columns = overlap(np.arange(width + 1), np.arange(bitmap.shape[1] + 1) * scale)
    return rows @ bitmap @ columns.T


def overlap(cells: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The share of each interval of `cells` that each interval of `parts` covers.

    Args:
        cells: ascending borders of n intervals, (n + 1,).
        parts: ascending borders of m intervals, (m + 1,).

    Returns:
        (n, m) in [0, 1].
    """
    low = np.maximum(cells[:-1, None], parts[None, :-1])
    high = np.minimum(cells[1:, None], parts[None, 1:])
    return np.clip(high - low, 0, None) / np.diff(cells)[:, None]
