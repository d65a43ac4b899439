"""Draws docs/pictures/route.svg, the route of the data: python scripts/draw_route.py."""

from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "docs/pictures/route.svg"
WIDTH, HEIGHT, BOX, GAP, TOP = 1040, 300, 184, 24, 112
STAGES = (  # title, two lines, file of the hooks, tokens after it ("" where none merge)
    ("image", "336 x 336 pixels", "optional: resize=", "input_resize", ""),
    ("vision tower", "every layer, between", "attention and MLP", "vision_tower", "576 → 54"),
    ("projector", "once, after it:", "prefix=, prefix_share=", "projector", "54"),
    ("language model", "prefill, chosen layers:", "decoder={8: 0.5}", "language_model", "54 → 27"),
    ("answer", "decode reads the", "shorter KV cache", "kv_cache", ""),
)
COUNTS = (
    "MergeConfig(ratio=0.9, decoder={8: 0.5}) → token_schedule.py: every token count, before an image is seen"
    " → processor: 54 placeholders"
)
MERGE = (
    "One merge, the same in every place: keys → methods/ choose each token's parent → merge/plan.py"
    " → merge/reduce.py"
)
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:14px;fill:#1f2328;text-anchor:middle}"
    ".title{font-weight:600;font-size:16px}.file{font-family:ui-monospace,monospace;font-size:11.5px;fill:#57606a}"
    ".count{font-weight:600;fill:#0969da}"
)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of text, centered at x."""
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str) -> str:
    """A rounded rectangle."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{line}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    """An arrow from one point to another."""
    return f'<path d="M{x} {y}L{to_x} {to_y}" stroke="#57606a" stroke-width="1.5" marker-end="url(#head)"/>'


def draw() -> str:
    """The picture as SVG."""
    left = (WIDTH - len(STAGES) * BOX - (len(STAGES) - 1) * GAP) / 2
    middle = [left + i * (BOX + GAP) + BOX / 2 for i in range(len(STAGES))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>The route of the data through a merging LLaVA</title>",
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z" fill="#57606a"/></marker>',
        box(0, 0, WIDTH, HEIGHT, "#ffffff", "none"),
        box(left, 18, WIDTH - 2 * left, 44, "#fff8c5", "#d4a72c"),
        text(WIDTH / 2, 45, COUNTS),
        text(WIDTH / 2, TOP + 170, MERGE),
        *(arrow(x, 62, x, TOP - 1) for x in middle[:4]),
    ]
    for i, (title, first, second, file, tokens) in enumerate(STAGES):
        colors = ("#ddf4ff", "#54aeff") if tokens else ("#f6f8fa", "#d0d7de")
        parts += [
            box(middle[i] - BOX / 2, TOP, BOX, 112, *colors),
            text(middle[i], TOP + 27, title, "title"),
            text(middle[i], TOP + 51, first),
            text(middle[i], TOP + 69, second),
            text(middle[i], TOP + 98, f"hooks/{file}.py", "file"),
        ]
        if tokens:
            parts.append(text(middle[i], TOP + 136, f"{tokens} tokens", "count"))
        if i:
            parts.append(arrow(middle[i] - BOX / 2 - GAP, TOP + 56, middle[i] - BOX / 2 - 1, TOP + 56))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(draw())
