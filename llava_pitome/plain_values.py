"""Numbers of numpy, torch and Python's number types as int and float, recognised without importing numpy."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, str, type(None))
DIGITS = 17  # significant decimal digits that tell any two float64 apart


def plain(value: Any) -> Any:
    """Returns a value with arrays and tensors, scalars included, as plain Python numbers and tuples.

    A float of lower precision than Python's becomes the shortest decimal that its dtype rounds to the same
    number, which is how numpy prints it: float32's 0.9 is 0.9 and not 0.8999999761581421. An array or a
    tensor without dimensions is a number, one with dimensions a tuple. A Fraction or Decimal becomes the
    nearest float. Values of any other kind, and the sizes that torch.compile knows by symbols alone, are
    returned as they are.

    Raises:
        ValueError: a tensor on the meta device, which has no value.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{value!r} is on the meta device and so has no value; give a number")
    elif isinstance(value, PLAIN) and not hasattr(value, "dtype"):  # enumerations
        return next(kind for kind in PLAIN if isinstance(value, kind))(value)
    elif isinstance(value, Fraction | Decimal):
        return _nearest(value)
    elif not all(hasattr(value, name) for name in ("dtype", "ndim", "item")):
        return value
    if value.ndim:
        return tuple(plain(x) for x in value)
    found = value.item()
    if not isinstance(value, Tensor) and getattr(value.dtype, "kind", "") == "O":
        return plain(found)
    if not isinstance(value, Tensor) and not isinstance(
        found, PLAIN
    ):  # such as numpy.longdouble, its own item
        return float(value) if value.dtype.kind == "f" else found
    return _shortest(value, found) if type(found) is float else found


def whole(value: Any, name: str) -> int:
    """Returns a count as Python's int; a size that torch.compile knows by a symbol alone stays as it is.

    Raises:
        ValueError: it is no whole number, such as 576.0 or True; `name` is what it counts.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int | torch.SymInt):
        raise ValueError(f"{name}={value!r} is not allowed: it must be a whole number")
    return found


def _nearest(value: Fraction | Decimal) -> Any:
    """Returns a number as a float; unchanged where no float is near it."""
    try:
        return float(value)
    except (OverflowError, ValueError):  # beyond the largest float, or a signaling NaN
        return value


def _shortest(value: Any, exact: float) -> float:
    """Returns the decimal of fewest digits that the dtype of a scalar rounds to its value, `exact`."""
    for digits in range(1, DIGITS):
        decimal = float(f"{exact:.{digits}g}")
        if _rounded(decimal, value) == exact:
            return decimal
    return exact


def _rounded(x: float, like: Any) -> float:
    """Returns a number as the dtype of a scalar holds it."""
    if isinstance(like, Tensor):
        return torch.tensor(x, dtype=like.dtype, device="cpu").item()
    return like.dtype.type(x).item()
