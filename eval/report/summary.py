"""A report's numbers in sentences: than which methods PiToMe is better, worse, or neither."""

from collections.abc import Iterator

from eval.naming import PITOME, amount_phrase, method_title, place_phrase
from eval.report.rows import REFERENCES, Difference, Row

ALPHA = 0.05  # below which a difference counts as one


def reference_title(kind: str) -> str:
    """The method and the place to which a kind of difference refers."""
    method, place = REFERENCES[kind]
    return f"{method_title(method)} {place_phrase(place)}"


def sentences(rows: list[Row]) -> list[str]:
    """All that the rows of a task say."""
    if not any(row.interval for row in rows):
        metric = next(iter(rows[0].metrics), "its metric")
        return [
            f"Answers to this task have no scores of their own, so images cannot be paired: {metric} is "
            "given as lmms-eval reports it, without intervals and p values."
        ]
    if not any(row.same or row.cross or row.best for row in rows):
        return ["PiToMe and another method were never compared at the same tokens."]
    across = [line for kind in REFERENCES for line in across_places(rows, kind)]
    return [count_wins(rows), *same_place(rows), *across]


def count_wins(rows: list[Row]) -> str:
    """One sentence about all comparisons in the same place."""
    found = [row.same for row in rows if row.same]
    better = sum(d.p < ALPHA and d.mean < 0 for d in found)
    worse = sum(d.p < ALPHA and d.mean > 0 for d in found)
    return (
        f"Of {len(found)} comparisons in the same place at the same tokens, PiToMe is better in {better}, "
        f"worse in {worse}, and not significantly different in {len(found) - better - worse} "
        f"(p < {ALPHA}, each by itself)."
    )


def same_place(rows: list[Row]) -> Iterator[str]:
    """A sentence for every place and number of tokens where PiToMe is compared."""
    references = [row for row in rows if row.method == PITOME]
    for place in dict.fromkeys(row.place for row in references):
        for reference in sorted((r for r in references if r.place == place), key=lambda r: -r.tokens):
            others = [r for r in rows if r.same and (r.place, r.tokens) == (place, reference.tokens)]
            if others:
                verdict = _verdict({method_title(r.method): r.same for r in others})
                score = _score(reference)
                kept = amount_phrase(reference.tokens)
                yield f"At {kept}, all {place_phrase(place)}, PiToMe ({score}) {verdict}."


def across_places(rows: list[Row], kind: str) -> Iterator[str]:
    """A sentence for every number of tokens: a reference against each method in its own place.

    Args:
        rows: of a task.
        kind: of difference, a key of REFERENCES.
    """
    references = {r.tokens: r for r in rows if (r.method, r.place) == REFERENCES[kind]}
    for tokens in sorted(references, reverse=True):
        others = {
            f"{method_title(r.method)} {place_phrase(r.place)}{'*' if r.merges_late else ''}": getattr(
                r, kind
            )
            for r in rows
            if getattr(r, kind) and r.tokens == tokens
        }
        if others:
            name = f"{reference_title(kind)} ({_score(references[tokens])})"
            yield f"At {amount_phrase(tokens)}, each in its own place, {name} {_verdict(others)}."


def _score(row: Row) -> str:
    """A row's accuracy, and its share of the unmerged model's."""
    share = "" if row.of_base is None else f", {row.of_base:.1f} % of the unmerged model"
    return f"{row.score:.1f} %{share}"


def _verdict(differences: dict[str, Difference]) -> str:
    """Than which methods the reference is better, worse, or neither; signs are the reference's."""
    better = {name: d for name, d in differences.items() if d.p < ALPHA and d.mean < 0}
    worse = {name: d for name, d in differences.items() if d.p < ALPHA and d.mean > 0}
    neither = {name: d for name, d in differences.items() if name not in better and name not in worse}
    groups = {"is better than": better, "does not differ significantly from": neither, "is worse than": worse}
    return "; ".join(f"{verb} {_with_numbers(group)}" for verb, group in groups.items() if group)


def _with_numbers(differences: dict[str, Difference]) -> str:
    """Names with differences and p values, the largest difference first."""
    ordered = sorted(differences.items(), key=lambda item: -abs(item[1].mean))
    not_after_holm = "; not after Holm's correction"
    return ", ".join(
        f"{name} ({points(-d.mean)}, p = {p_value(d.p)}{not_after_holm if d.p < ALPHA <= d.holm else ''})"
        for name, d in ordered
    )


def points(difference: float) -> str:
    """A difference in points; without a sign where it rounds to zero."""
    text = f"{difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def p_value(p: float) -> str:
    """A p value in as many digits as are meaningful."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"
