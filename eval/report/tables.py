"""A report's tables as pandas data frames of text, as Markdown and as CSV."""

from collections.abc import Callable, Sequence

import pandas

from eval.evaluation.results import ANSWER_TYPES
from eval.naming import amount, amount_phrase, method_title
from eval.report.rows import REFERENCES, Difference, Row
from eval.report.summary import p_value, points, reference_title

ANSWER = "answer of "  # and a number of tokens, as the benchmark names it
CSV_ATTRIBUTES = (
    "name", "method", "place", "tokens", "seeds", "image_tokens", "llm_tokens", "score", "of_base", "peak",
    "cache",
)  # fmt: skip
Columns = dict[str, Callable[[Row], str]]


def all_tables(rows: Sequence[Row]) -> dict[str, pandas.DataFrame]:
    """The tables of a task by heading."""
    found = {
        "In short: each method in its own place": short_table(rows),
        "Every method in every place": full_table(rows),
    }
    for kind in REFERENCES:
        if any(getattr(row, kind) for row in rows):
            heading = f"Each method in its own place, against {reference_title(kind)}"
            found[heading] = reference_table(rows, kind)
    return found


def full_table(rows: Sequence[Row]) -> pandas.DataFrame:
    """One line per row, the unmerged model first, then by place, tokens and score."""
    paired = any(row.interval for row in rows)
    answer = next((part for row in rows for part in row.times if part.startswith(ANSWER)), None)
    columns: Columns = {
        "method": lambda r: method_title(r.method) + (f" ({r.seeds} draws)" if r.seeds > 1 else ""),
        "place": _place,
        "tokens": lambda r: "" if r.tokens is None else amount(r.tokens),
        "tokens at the LLM": lambda r: f"{r.image_tokens:.4g}",
        "mean over its layers": lambda r: f"{r.llm_tokens:.4g}",
    }
    if paired:
        columns["accuracy, %"] = _accuracy
    else:
        for name in rows[0].metrics:
            columns[name.split(",")[0]] = lambda r, name=name: _number(r.metrics.get(name), ".4g")
    columns["% of base"] = lambda r: _number(r.of_base, ".1f")
    for kind in ANSWER_TYPES:
        if any(kind in row.by_type for row in rows):
            columns[kind] = lambda r, kind=kind: _number(r.by_type.get(kind), ".1f")
    if paired:
        columns |= _difference_columns("same", "PiToMe")
    if any(row.gflops for row in rows):
        columns["GFLOPs"] = lambda r: _number(r.gflops.get("total"), ".4g")
    if answer is not None:
        columns["prefill, ms"] = lambda r: _quartiles(r, "prefill")
        columns[f"{answer}, ms"] = lambda r: _quartiles(r, answer)
        columns["peak, MiB"] = lambda r: _number(r.peak, ".3g")
        columns["KV, MiB"] = lambda r: _number(r.cache, ".3g")
    return _frame(ordered(rows), columns)


def reference_table(rows: Sequence[Row], kind: str) -> pandas.DataFrame:
    """Every method in its own place against one of REFERENCES."""
    columns: Columns = {
        "tokens": lambda r: amount(r.tokens),
        "method": lambda r: method_title(r.method),
        "place": _place,
        "mean over the LLM's layers": lambda r: f"{r.llm_tokens:.4g}",
        "accuracy, %": _accuracy,
        **_difference_columns(kind, reference_title(kind)),
        "GFLOPs": lambda r: _number(r.gflops.get("total"), ".4g"),
        "prefill, ms": lambda r: _quartiles(r, "prefill"),
    }
    compared = [row for row in rows if getattr(row, kind)]
    return _frame(sorted(compared, key=lambda row: (-row.tokens, -row.score)), columns)


def short_table(rows: Sequence[Row]) -> pandas.DataFrame:
    """Every method in its own place, one column per number of tokens, the best method first."""
    at_home = [row for row in rows if row.is_at_home and row.tokens is not None]
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for row in at_home:
        scores.setdefault((method_title(row.method), _place(row)), {})[row.tokens] = row.score
    tokens = sorted({row.tokens for row in at_home}, reverse=True)
    best_first = sorted(scores.items(), key=lambda item: -sum(item[1].values()) / len(item[1]))
    lines = [[*key, *(_number(line.get(kept), ".1f") for kept in tokens)] for key, line in best_first]
    return pandas.DataFrame(lines, columns=["method", "place", *map(amount_phrase, tokens)])


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows by place, in each the most tokens first, and among these the best score."""
    places = list(dict.fromkeys(row.place for row in rows))
    return sorted(rows, key=lambda row: (places.index(row.place), -(row.tokens or 0), -row.score))


def markdown(table: pandas.DataFrame) -> str:
    """A table as Markdown; pandas' own needs tabulate and pads its cells."""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    cells = [[cell.replace("*", r"\*") for cell in line] for line in lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def csv(tasks: dict[str, list[Row]]) -> str:
    """Every number of every row as CSV."""
    everything = [row for rows in tasks.values() for row in rows]
    kinds = sorted({kind for row in everything for kind in row.by_type})
    parts = sorted({part for row in everything for part in row.times})
    records = []
    for task, rows in tasks.items():
        for row in ordered(rows):
            record = {"task": task} | {name: getattr(row, name) for name in CSV_ATTRIBUTES}
            record |= dict(zip(("low", "high"), row.interval or (None, None)))
            record |= {kind: row.by_type.get(kind) for kind in kinds}
            for part in ("tower", "projector", "llm", "total"):
                record[f"{part}_gflops"] = row.gflops.get(part)
            for kind in ("same", *REFERENCES):
                for name in Difference._fields:
                    record[f"{kind}_{name}"] = getattr(getattr(row, kind), name, None)
            for part in parts:
                quartiles = row.times.get(part, (None, None, None))
                record |= {f"{part}_ms_{q}": ms for q, ms in zip(("q1", "median", "q3"), quartiles)}
            records.append(record)
    return pandas.DataFrame(records, dtype=object).to_csv(index=False, lineterminator="\n")


def _frame(rows: Sequence[Row], columns: Columns) -> pandas.DataFrame:
    """A table of text with one line per row."""
    return pandas.DataFrame(
        {head: [cell(row) for row in rows] for head, cell in columns.items()}, dtype=object
    )


def _difference_columns(kind: str, name: str) -> Columns:
    """A difference with its interval, its p value, and that by Holm."""

    def made(text: Callable[[Difference], str]) -> Callable[[Row], str]:
        return lambda r: "" if getattr(r, kind) is None else text(getattr(r, kind))

    return {
        f"difference to {name}": made(lambda d: f"{points(d.mean)} [{points(d.low)}, {points(d.high)}]"),
        "p": made(lambda d: p_value(d.p)),
        "p (Holm)": made(lambda d: p_value(d.holm)),
    }


def _place(row: Row) -> str:
    return row.place + ("*" if row.merges_late else "")


def _accuracy(row: Row) -> str:
    return f"{row.score:.1f}" + (f" [{row.interval[0]:.1f}, {row.interval[1]:.1f}]" if row.interval else "")


def _quartiles(row: Row, part: str) -> str:
    low, median, high = row.times.get(part, (None, None, None))
    return "" if median is None else f"{median:.1f} ({low:.1f}-{high:.1f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
