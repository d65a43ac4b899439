"""Slow references in plain Python, one number at a time, written from the paper's equations."""

import math
from itertools import pairwise


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
    ranked = by_energy(tokens, margin, alpha, energy)
    a, b = ranked[0 : 2 * remove : 2], ranked[1 : 2 * remove : 2]
    parent = list(range(len(tokens)))
    for i in a:
        parent[i] = min(b, key=lambda j: (-cosine(tokens[i], tokens[j]), j))
    return parent


def tome(tokens: list[list[float]], remove: int) -> list[int]:
    a, b = range(0, len(tokens), 2), range(1, len(tokens), 2)
    best = {i: min(b, key=lambda j: (-cosine(tokens[i], tokens[j]), j)) for i in a}
    gone = sorted(a, key=lambda i: (-cosine(tokens[i], tokens[best[i]]), i))[:remove]
    return [best[i] if i in gone else i for i in range(len(tokens))]


def parts(length: int, count: int) -> list[list[int]]:
    """`length` places cut into `count` parts, as even as can be."""
    cuts = [i * length // max(count, 1) for i in range(count + 1)]
    return [list(range(a, b)) for a, b in pairwise(cuts)]


def middle(part: list[int]) -> int:
    return part[(len(part) - 1) // 2]


def down(score: list[float], among=None) -> list[int]:
    """Positions by score, highest first; of equals the lower first."""
    return sorted(range(len(score)) if among is None else among, key=lambda i: (-score[i], i))


def closest(tokens: list[list[float]], i: int, among: list[int]) -> int:
    if i in among:
        return i
    return min(among, key=lambda j: (-cosine(tokens[i], tokens[j]), j))


def tofu(
    tokens: list[list[float]], remove: int, depth: float, until: float = 0.5
) -> tuple[list[int], list[int]]:
    parent = tome(tokens, remove)
    return parent, [int(depth >= until or parent[i] == i) for i in range(len(tokens))]


def mlerp(tokens: list[list[float]], sizes: list[float]) -> list[float]:
    """The average's direction at the length of the longest (of several)."""
    if len(tokens) == 1:
        return tokens[0]
    mean = [sum(s * t[d] for s, t in zip(sizes, tokens)) / sum(sizes) for d in range(len(tokens[0]))]
    longest, own = max(math.hypot(*t) for t in tokens), math.hypot(*mean)
    return [m * longest / own for m in mean]


def dct(tokens: list[list[float]], remove: int) -> tuple[list[int], list[list[float]]]:
    """Parents, and the tokens themselves."""
    n, channels = len(tokens), range(len(tokens[0]))
    m = n - remove

    def wave(k: int, place: int, length: int) -> float:
        return math.sqrt((1 if k == 0 else 2) / length) * math.cos(math.pi * (place + 0.5) * k / length)

    spectrum = [[sum(wave(k, i, n) * tokens[i][d] for i in range(n)) for d in channels] for k in range(m)]
    back = [
        [math.sqrt(m / n) * sum(wave(k, j, m) * spectrum[k][d] for k in range(m)) for d in channels]
        for j in range(m)
    ]
    return [middle(part) for part in parts(n, m) for _ in part], back


def diffrate(
    tokens: list[list[float]], remove: int, attention: list[float], prune: float = 0.5
) -> tuple[list[int], list[int]]:
    order, n = down(attention), len(tokens)
    kept, dropped = order[: n - remove], order[n - round(remove * prune) :]
    return [closest(tokens, i, kept) for i in range(n)], [int(i not in dropped) for i in range(n)]


def grid(remove: int, rows: int, columns: int) -> list[int]:
    cells = rows * columns - remove
    bands = round(math.sqrt(cells * rows / columns))
    while bands * columns < cells:  # more cells in a band than it has columns
        bands += 1
    bands = min(bands, rows, cells)
    parent = [-1] * (rows * columns)
    for band, numbers in zip(parts(rows, bands), parts(cells, bands)):
        for cell in parts(columns, len(numbers)):
            for row in band:
                for column in cell:
                    parent[row * columns + column] = middle(band) * columns + middle(cell)
    return parent


def fastv(remove: int, attention: list[float]) -> list[int]:
    return sorted(down(attention)[: len(attention) - remove])


def visionzip(
    tokens: list[list[float]], remove: int, attention: list[float], contextual: float = 10 / 64
) -> list[int]:
    n = len(tokens)
    count = max(round((n - remove) * contextual), 1)
    dominant = down(attention)[: n - remove - count]
    rest = [i for i in range(n) if i not in dominant]
    targets = [rest[middle(part)] for part in parts(len(rest), count)]
    return [i if i in dominant else closest(tokens, i, targets) for i in range(n)]


def prumerge(
    tokens: list[list[float]], remove: int, attention: list[float], attended: float, neighbours: int
) -> tuple[list[int], list[list[float]]]:
    """Parents, and the tokens themselves."""
    n, m, channels = len(tokens), len(tokens) - remove, range(len(tokens[0]))
    top = down(attention)[: round(m * attended)]
    rest = [i for i in range(n) if i not in top]
    kept = sorted(top + [rest[middle(part)] for part in parts(len(rest), m - len(top)) if part])
    found = []
    for i in kept:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-cosine(tokens[i], tokens[j]), j))
        group = [i, *near[:neighbours]]
        total = sum(attention[j] for j in group)
        found.append([sum(attention[j] * tokens[j][d] for j in group) / total for d in channels])
    return [closest(tokens, i, kept) for i in range(n)], found


def divprune(tokens: list[list[float]], remove: int) -> list[int]:
    n = len(tokens)

    def distance(i: int, j: int) -> float:
        return 1 - cosine(tokens[i], tokens[j])

    chosen: list[int] = []
    while len(chosen) < n - remove:
        left = [i for i in range(n) if i not in chosen]
        nearest = [min(distance(i, j) for j in chosen or left if j != i) for i in left]
        chosen.append(left[nearest.index(max(nearest))])
    return sorted(chosen)


def ratings(
    tokens: list[list[float]], text: list[list[float]], attention: list[list[float]], mask: list[bool]
) -> list[float]:
    words = [q for q in range(len(text)) if mask[q]]
    relevance = dict.fromkeys(words, 0.0)
    for token in tokens:
        products = {q: math.exp(sum(x * y for x, y in zip(token, text[q]))) for q in words}
        for q in words:
            relevance[q] += products[q] / sum(products.values()) / len(tokens)
    raters = [q for q in words if relevance[q] >= sum(relevance.values()) / len(words)]
    return [sum(attention[q][i] for q in raters) / len(raters) for i in range(len(tokens))]


def density_peaks(tokens: list[list[float]], count: int, neighbours: int) -> list[int]:
    every = range(len(tokens))
    apart = [[math.dist(a, b) / math.sqrt(len(a)) for b in tokens] for a in tokens]
    density = []
    for i in every:
        near = sorted(apart[i][j] for j in every if j != i)[:neighbours]
        density.append(math.exp(-sum(d * d for d in near) / max(len(near), 1)))
    score = []
    for i in every:
        denser = [apart[i][j] for j in every if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else max(apart[i])))
    return down(score)[:count]


def sparsevlm(
    tokens: list[list[float]],
    remove: int,
    score: list[float],
    recycled: float = 0.3,
    peaks: float = 0.1,
    neighbours: int | None = None,
) -> tuple[list[int], list[int]]:
    n = len(tokens)
    groups = min(math.ceil(remove * recycled * peaks / (1 - recycled * peaks)), (n - remove) // 2)
    order = down(score)
    kept = order[: n - remove - groups]
    rest = order[len(kept) :]
    pool = sorted(rest[: max(round(recycled * len(rest)), groups)] if groups else [])
    found = density_peaks([tokens[i] for i in pool], groups, neighbours or groups) if groups else []
    centres = [pool[i] for i in found]
    parent = [closest(tokens, i, centres if i in pool else kept + centres) for i in range(n)]
    return parent, [int(i in kept or i in pool) for i in range(n)]
