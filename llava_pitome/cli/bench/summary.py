"""From samples to medians, quartiles, speed-ups and their share of what FLOPs promise."""

import statistics
from collections.abc import Sequence
from typing import Any

PARTS = ("tower", "merging", "projector", "llm", "prefill", "decode")  # then the answers


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `run.measure`, each with what follows from it; dense rows come first in their batch.

    Adds:
        median: (first quartile, median, third quartile) of the seconds of every part.
        speedup: the same of dense seconds by this side's, round by round, for every part both have.
        merging_share: merging's part of the tower's median, None for the dense side.
        flop_ratio: dense FLOPs by this side's, of the tower and, where there is one, the whole prompt.
        efficiency: median speed-up by FLOP ratio, of the tower and the prefill.
    """
    done, dense = [], {}
    for row in rows:
        place = (row["batch"], row["patches"])
        dense.setdefault(place, row)
        done.append(row | _follows(row, dense[place]))
    return done


def _follows(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    seconds, other = row["seconds"], dense["seconds"]
    speedup = {
        part: quartiles([a / b for a, b in zip(other[part], seconds[part])])
        for part in seconds
        if part in other
    }
    ratio = {"tower": dense["flops"]["tower"] / row["flops"]["tower"]}
    if "llm" in row["flops"]:
        ratio["prefill"] = sum(dense["flops"].values()) / sum(row["flops"].values())
    share = None
    if "merging" in seconds:
        share = statistics.median(seconds["merging"]) / statistics.median(seconds["tower"])
    return {
        "median": {part: quartiles(taken) for part, taken in seconds.items()},
        "speedup": speedup,
        "merging_share": share,
        "flop_ratio": ratio,
        "efficiency": {part: speedup[part][1] / ratio[part] for part in ratio},
    }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def table(rows: list[dict[str, Any]]) -> str:
    """What `summarise` gives as a Markdown table."""
    parts = [p for p in PARTS if any(p in row["median"] for row in rows)]
    parts += sorted({p for row in rows for p in row["median"]} - set(parts), key=lambda p: int(p.split()[-1]))
    head = ["batch", "patches", "side", "tokens"]
    for part in parts:
        head += ["merging"] if part == "merging" else [f"{part}, ms"] + ["×"] * _compared(part)
        head += ["of FLOPs' ×"] * (
            part in ("tower", "prefill") and any(part in r["efficiency"] for r in rows)
        )
    head += ["peak, MB"] + ["KV cache, MB"] * any("kv_cache_bytes" in row for row in rows)
    lines = [head, ["---"] * len(head)] + [_cells(row, parts, rows) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def brief(rows: list[dict[str, Any]]) -> str:
    """What `summarise` gives in few columns: how many times as fast as dense, and as FLOPs promise."""
    parts = [p for p in ("tower", "prefill") if any(p in row["efficiency"] for row in rows)]
    answers = [p for p in rows[0]["median"] if p.startswith("answer") and p != "answer of 1"]
    head = ["batch", "patches", "ratio", "tokens", "merging's share of the tower"]
    head += [f"{p} (by FLOPs)" for p in parts] + answers
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if row["merging"]:
            cells = [row["batch"], row["patches"], row["side"], row["tokens"], f"{row['merging_share']:.1%}"]
            cells += [f"{row['speedup'][p][1]:.2f} ({row['flop_ratio'][p]:.2f})" for p in parts]
            lines.append([str(c) for c in cells] + [f"{row['speedup'][p][1]:.2f}" for p in answers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _compared(part: str) -> bool:
    """Whether a speed-up is told of this part."""
    return part in ("tower", "prefill", "llm") or part.startswith("answer")


def _cells(row: dict[str, Any], parts: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    cells = [str(row["batch"]), str(row["patches"]), row["side"], str(row["tokens"])]
    for part in parts:
        taken, faster = row["median"].get(part), row["speedup"].get(part)
        if part == "merging":
            cells.append("" if row["merging_share"] is None else f"{row['merging_share']:.1%}")
            continue
        cells.append("" if taken is None else f"{taken[1] * 1000:.1f}")
        if _compared(part):
            cells.append("" if faster is None else f"{faster[1]:.2f} ({faster[0]:.2f}-{faster[2]:.2f})")
        if part in ("tower", "prefill") and any(part in r["efficiency"] for r in rows):
            cells.append(f"{row['flop_ratio'][part]:.2f} -> {row['efficiency'][part]:.2f}")
    cells.append(f"{row['peak_bytes'] / 1e6:.1f}")
    if any("kv_cache_bytes" in r for r in rows):
        cells.append(f"{row['kv_cache_bytes'] / 1e6:.1f}")
    return cells
