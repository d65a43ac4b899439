"""Slow references in plain Python, one number at a time, written from the paper's equations."""

import math


def cosine(a: list[float], b: list[float]) -> float:
    dot, norms = sum(x * y for x, y in zip(a, b)), math.hypot(*a) * math.hypot(*b)
    return dot / norms


def energies(
    tokens: list[list[float]], margin: float, alpha: float = 1.0, energy: str = "eq4"
) -> list[float]:
    def f(x: float) -> float:
        if x >= margin:
            return x if energy == "eq4" else x - margin
        return alpha * (math.exp(x - margin) - 1)

    return [sum(f(cosine(a, b)) for b in tokens) / len(tokens) for a in tokens]


def by_energy(tokens: list[list[float]], margin: float, alpha: float = 1.0, energy: str = "eq4") -> list[int]:
    e = energies(tokens, margin, alpha, energy)
    return sorted(range(len(tokens)), key=lambda i: (-e[i], i))


def pitome(
    tokens: list[list[float]], remove: int, margin: float, alpha: float = 1.0, energy: str = "eq4"
) -> list[int]:
    down = by_energy(tokens, margin, alpha, energy)
    a, b = down[0 : 2 * remove : 2], down[1 : 2 * remove : 2]
    parent = list(range(len(tokens)))
    for i in a:
        parent[i] = min(b, key=lambda j: (-cosine(tokens[i], tokens[j]), j))
    return parent


def tome(tokens: list[list[float]], remove: int) -> list[int]:
    a, b = range(0, len(tokens), 2), range(1, len(tokens), 2)
    best = {i: min(b, key=lambda j: (-cosine(tokens[i], tokens[j]), j)) for i in a}
    gone = sorted(a, key=lambda i: (-cosine(tokens[i], tokens[best[i]]), i))[:remove]
    return [best[i] if i in gone else i for i in range(len(tokens))]
