"""Readers for the words that say how far tokens merge, and where."""


def amount(text: str) -> float | int:
    """Reads what stays: a share in (0, 1] with a point (0.5), or a number of tokens from 1 (64)."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if "." not in text or not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def layers(text: str) -> dict[int, float | int]:
    """Reads what stays at layers of the language model: 8:0.5,16:64."""
    found: dict[int, float | int] = {}
    for word in text.split(","):
        layer, _, keep = word.partition(":")
        if not layer.isdecimal() or int(layer) in found:
            raise ValueError(word)
        found[int(layer)] = amount(keep)
    return found


def sides(text: str) -> tuple[int, int]:
    """Reads rows and columns: 9x10."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ValueError(text)
    return int(rows), int(columns)


def counts(text: str) -> tuple[int, ...]:
    """Reads different whole numbers from 0, separated by commas."""
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ValueError(text)
    return numbers


def positives(text: str) -> tuple[int, ...]:
    """Reads whole numbers from 1: 1,8,32."""
    numbers = tuple(int(word) for word in text.split(","))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def servers(text: str) -> dict[str, str]:
    """Reads names and addresses: plain=http://127.0.0.1:8000,merged=http://127.0.0.1:8001."""
    found: dict[str, str] = {}
    for word in text.split(","):
        name, _, url = word.partition("=")
        if not name or name in found or not url.startswith(("http://", "https://")):
            raise ValueError(word)
        found[name] = url.rstrip("/").removesuffix("/v1")
    return found
