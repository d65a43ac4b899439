"""A report's tables: heads and cells, as Markdown and as CSV."""

import csv
import io
from collections.abc import Callable, Sequence

from eval.results import ANSWER_TYPES
from eval.rows import Difference, Row
from eval.verdicts import REFERENCES, late, p_value, points, reference, title

END_TO_END = "answer of "  # so many tokens, as the bench names it
RAW = (
    "name",
    "method",
    "place",
    "tokens",
    "seeds",
    "image_tokens",
    "llm_tokens",
    "score",
    "of_base",
    "peak",
    "cache",
)


def heads(rows: Sequence[Row]) -> list[str]:
    """The columns that these rows can fill."""
    return [head for head, _ in _columns(rows)]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line a row, the unmerged model first, then by place, tokens and score."""
    columns = _columns(rows)
    return [[cell(row) for _, cell in columns] for row in ordered(rows)]


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Places as they come, in each the most tokens first, and among these the best score."""
    places = list(dict.fromkeys(row.place for row in rows))
    return sorted(rows, key=lambda row: (places.index(row.place), -(row.tokens or 0), -row.score))


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Heads, and how their cells are made."""
    paired = any(row.interval for row in rows)
    kinds = [kind for kind in ANSWER_TYPES if any(kind in row.by_type for row in rows)]
    answer = next((part for row in rows for part in row.times if part.startswith(END_TO_END)), None)
    found: list[tuple[str, Callable[[Row], str]]] = [
        ("method", lambda r: title(r.method) + (f" ({r.seeds} draws)" if r.seeds > 1 else "")),
        ("place", lambda r: r.place + ("*" if late(r) else "")),
        ("tokens", lambda r: "" if r.tokens is None else str(r.tokens)),
        ("tokens at the LLM", lambda r: str(r.image_tokens)),
        ("mean over its layers", lambda r: f"{r.llm_tokens:.4g}"),
    ]
    if paired:
        found += [("accuracy, %", _accuracy)]
    else:
        found += [
            (name.split(",")[0], lambda r, name=name: _number(r.metrics.get(name), ".4g"))
            for name in rows[0].metrics
        ]
    found += [("% of base", lambda r: _number(r.of_base, ".1f"))]
    found += [(kind, lambda r, kind=kind: _number(r.by_type.get(kind), ".1f")) for kind in kinds]
    if paired:
        found += [("difference to PiToMe", lambda r: difference(r.same)), ("p", lambda r: _p(r.same))]
        found += [("p (Holm)", lambda r: _p(r.same, holm=True))]
    if any(row.gflops for row in rows):
        found += [("GFLOPs", lambda r: _number(r.gflops.get("total"), ".4g"))]
    if answer is not None:
        found += [("prefill, ms", lambda r: _quartiles(r.times.get("prefill")))]
        found += [(f"{answer}, ms", lambda r: _quartiles(r.times.get(answer)))]
        found += [
            ("peak, MiB", lambda r: _number(r.peak, ".3g")),
            ("KV, MiB", lambda r: _number(r.cache, ".3g")),
        ]
    return found


def cross(rows: Sequence[Row], kind: str) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of a comparison across places: every method in its own against one of REFERENCES."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("tokens", lambda r: str(r.tokens)),
        ("method", lambda r: title(r.method)),
        ("place", lambda r: r.place + ("*" if late(r) else "")),
        ("mean over the LLM's layers", lambda r: f"{r.llm_tokens:.4g}"),
        ("accuracy, %", _accuracy),
        (f"difference to {reference(kind)}", lambda r: difference(getattr(r, kind))),
        ("p", lambda r: _p(getattr(r, kind))),
        ("p (Holm)", lambda r: _p(getattr(r, kind), holm=True)),
        ("GFLOPs", lambda r: _number(r.gflops.get("total"), ".4g")),
        ("prefill, ms", lambda r: _quartiles(r.times.get("prefill"))),
    ]
    told = sorted((row for row in rows if getattr(row, kind)), key=lambda row: (-row.tokens, -row.score))
    return [head for head, _ in columns], [[cell(row) for _, cell in columns] for row in told]


def brief(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the shortest table: every method in its own place, a column a number of tokens."""
    told = [row for row in rows if row.at_home and row.tokens is not None]
    tokens = sorted({row.tokens for row in told}, reverse=True)
    lines: dict[tuple[str, str], dict[int, Row]] = {}
    for row in told:
        lines.setdefault((row.method, row.place), {})[row.tokens] = row
    down = sorted(
        lines.values(), key=lambda line: -sum(row.score for row in line.values()) / len(line)
    )  # the best first
    cells = []
    for line in down:
        first = next(iter(line.values()))
        cells.append([title(first.method), first.place + ("*" if late(first) else "")])
        cells[-1] += [_number(line[count].score if count in line else None, ".1f") for count in tokens]
    return ["method", "place", *(f"{count} tokens" for count in tokens)], cells


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    whole = [heads, ["---"] * len(heads), *lines]
    return (
        "\n".join("| " + " | ".join(cell.replace("*", r"\*") for cell in line) + " |" for line in whole)
        + "\n"
    )


def raw(tasks: dict[str, list[Row]]) -> str:
    """Every number of every row as CSV."""
    rows = [row for found in tasks.values() for row in found]
    keys = {
        "type": sorted({kind for row in rows for kind in row.by_type}),
        "gflops": ("tower", "projector", "llm", "total"),
        "ms": sorted({part for row in rows for part in row.times}),
    }
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    compared = [f"{kind}_{part}" for kind in ("same", *REFERENCES) for part in Difference._fields]
    ends = [f"{part}_ms_{quartile}" for part in keys["ms"] for quartile in ("q1", "median", "q3")]
    out.writerow(
        [
            "task",
            *RAW,
            "low",
            "high",
            *keys["type"],
            *(f"{k}_gflops" for k in keys["gflops"]),
            *compared,
            *ends,
        ]
    )
    for task, found in tasks.items():
        for row in ordered(found):
            line = [task, *(getattr(row, name) for name in RAW), *(row.interval or ("", ""))]
            line += [row.by_type.get(kind, "") for kind in keys["type"]]
            line += [row.gflops.get(part, "") for part in keys["gflops"]]
            for told in (getattr(row, kind) for kind in ("same", *REFERENCES)):
                line += list(told) if told else [""] * len(Difference._fields)
            for part in keys["ms"]:
                line += list(row.times.get(part, ("", "", "")))
            out.writerow(["" if cell is None else cell for cell in line])
    return text.getvalue()


def difference(found: Difference | None) -> str:
    """Points and their interval."""
    return "" if found is None else f"{points(found.mean)} [{points(found.low)}, {points(found.high)}]"


def _accuracy(row: Row) -> str:
    return f"{row.score:.1f}" + (f" [{row.interval[0]:.1f}, {row.interval[1]:.1f}]" if row.interval else "")


def _p(found: Difference | None, holm: bool = False) -> str:
    return "" if found is None else p_value(found.holm if holm else found.p)


def _quartiles(taken: Sequence[float] | None) -> str:
    return "" if taken is None else f"{taken[1]:.1f} ({taken[0]:.1f}-{taken[2]:.1f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
