"""What a report's numbers say, in words: against whom PiToMe is ahead, level, or behind."""

from collections.abc import Iterator

from eval.combinations import REFERENCE, UNMERGED
from eval.labels import home, spot
from eval.rows import ALPHA, BEST, TOWER, Difference, Row

NAMES = {REFERENCE: "PiToMe", "released": "PiToMe (released)", BEST: "PiToMe (best)"}
REFERENCES = {"cross": (REFERENCE, TOWER), "best": (BEST, home(BEST))}  # each by the difference to it
HOLM = "not after Holm's correction"


def title(method: str) -> str:
    """A method's name for people."""
    recipe, colon, other = method.partition(":")
    return f"{other} (with the settings of {recipe})" if colon else NAMES.get(method, method)


def reference(kind: str) -> str:
    """What a kind of difference is to, and where that merges."""
    method, place = REFERENCES[kind]
    return f"{title(method)} {spot(place)}"


def same_place(rows: list[Row]) -> Iterator[str]:
    """A paragraph for every place and number of tokens where PiToMe can be compared."""
    references = [row for row in rows if row.method == REFERENCE]
    for place in dict.fromkeys(row.place for row in references):
        for mine in sorted((r for r in references if r.place == place), key=lambda r: -r.tokens):
            others = [r for r in rows if r.same and (r.place, r.tokens) == (place, mine.tokens)]
            told = {title(r.method): r.same for r in others}
            if told:
                score = f"{mine.score:.1f} %{_kept(mine)}"
                yield f"At {mine.tokens} tokens, all {spot(place)}, PiToMe ({score}) {_verdict(told)}."


def cross_place(rows: list[Row], kind: str) -> Iterator[str]:
    """A paragraph for every number of tokens: one way to merge against each method in its own place.

    Args:
        rows: of a task.
        kind: of difference, a key of REFERENCES.
    """
    mine = {r.tokens: r for r in rows if (r.method, r.place) == REFERENCES[kind]}
    for tokens in sorted(mine, reverse=True):
        told = {
            f"{title(r.method)} {spot(r.place)}{'*' if late(r) else ''}": getattr(r, kind)
            for r in rows
            if getattr(r, kind) and r.tokens == tokens
        }
        if told:
            score = f"{mine[tokens].score:.1f} %{_kept(mine[tokens])}"
            yield f"At {tokens} tokens, each in its own place, {reference(kind)} ({score}) {_verdict(told)}."


def late(row: Row) -> bool:
    """Whether all image tokens pass the first layers of the language model."""
    return row.tokens is not None and row.image_tokens > row.tokens


def _kept(row: Row) -> str:
    return "" if row.of_base is None else f", {row.of_base:.1f} % of the unmerged model"


def _verdict(told: dict[str, Difference]) -> str:
    """Ahead of whom, level with whom, behind whom; differences are told from the reference's side."""
    ahead = {name: d for name, d in told.items() if d.p < ALPHA and d.mean < 0}
    behind = {name: d for name, d in told.items() if d.p < ALPHA and d.mean > 0}
    level = {name: d for name, d in told.items() if name not in ahead and name not in behind}
    said = [
        f"{start} {_list(which)}"
        for start, which in (
            ("is ahead of", ahead),
            ("cannot be told apart from", level),
            ("is behind", behind),
        )
        if which
    ]
    return "; ".join(said)


def _list(which: dict[str, Difference]) -> str:
    """Names with differences and p values, the largest difference first."""
    down = sorted(which.items(), key=lambda named: -abs(named[1].mean))
    return ", ".join(
        f"{name} ({points(-d.mean)}, p = {p_value(d.p)}{'; ' + HOLM if d.p < ALPHA <= d.holm else ''})"
        for name, d in down
    )


def points(mean: float) -> str:
    """A difference in points; without a sign where it rounds to nothing."""
    said = f"{mean:+.1f}"
    return "0.0" if said in ("+0.0", "-0.0") else said


def p_value(p: float) -> str:
    """A p value in as many digits as mean something."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def counts(rows: list[Row]) -> str:
    """One sentence over everything that could be compared in the same place."""
    found = [row.same for row in rows if row.same]
    ahead = sum(d.p < ALPHA and d.mean < 0 for d in found)
    behind = sum(d.p < ALPHA and d.mean > 0 for d in found)
    return (
        f"Of {len(found)} comparisons in the same place at the same tokens, PiToMe is ahead in {ahead}, "
        f"behind in {behind}, and in {len(found) - ahead - behind} no difference can be told (p < {ALPHA}, "
        "each by itself)."
    )


def unpaired(rows: list[Row]) -> str:
    """What is said of a task whose answers have no scores of their own."""
    name = next(iter(rows[0].metrics), "its metric")
    return (
        f"Answers to this task have no scores of their own, so that pictures cannot be paired: {name} is "
        "given as lmms-eval reports it, without intervals and p values."
    )


def plain(rows: list[Row]) -> Row | None:
    """The unmerged model's row."""
    return next((row for row in rows if row.method == UNMERGED), None)
