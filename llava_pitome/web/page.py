"""The page: what stands where, and what pressing does. The only file that knows Gradio."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava_pitome.config import MergeConfig
from llava_pitome.drawing import panels
from llava_pitome.drawing.choices import at_home
from llava_pitome.drawing.panels import Point
from llava_pitome.drawing.study import Study
from llava_pitome.methods import METHODS
from llava_pitome.pictures import open_picture
from llava_pitome.web.desk import Answer, Desk

SIZE = 448  # pixels across a drawn picture
WAITING = 32  # people
NONE = "no merging"
MERGED, PLAIN = "### Answer with merging", "### Answer without"
EMPTY = "*Ask something; what merged is shown here.*"
CSS = ".numbers {font-size: 0.9em; color: var(--body-text-color-subdued);} footer {display: none !important;}"


def build(desk: Desk, examples: Sequence[tuple[Path, str]], ratio: float) -> gr.Blocks:
    """The page for a model.

    Args:
        desk: asks the model.
        examples: pictures and questions to pick.
        ratio: where the slider stands at first.
    """
    with gr.Blocks(title="llava_pitome", analytics_enabled=False) as page:
        gr.Markdown("# LLaVA with merged visual tokens")
        shown = gr.State(None)  # the study that the layer slider looks into
        with gr.Row():
            with gr.Column():
                picture = gr.Image(
                    type="filepath", sources=["upload", "clipboard"], label="Picture", height=240,
                    elem_id="picture", image_mode=None,
                )  # fmt: skip
                question = gr.Textbox(label="Question", elem_id="question", max_length=2000, submit_btn=False)
                with gr.Row():
                    method = gr.Dropdown(sorted(METHODS), value=MergeConfig.method, label="Method")
                    share = gr.Slider(
                        min(0.7, ratio),
                        1.0,
                        ratio,
                        step=0.005,
                        label="Ratio that each tower layer keeps",
                        elem_id="ratio",
                    )
                amount = gr.Markdown(_amount(desk, MergeConfig.method, ratio), elem_id="amount")
                compare = gr.Checkbox(label="Answer without merging too", elem_id="compare")
                asked = gr.Button("Ask", variant="primary", elem_id="ask")
                gr.Examples(
                    [[str(p), q] for p, q in examples],
                    [picture, question],
                    label="Examples",
                    examples_per_page=3,
                )
            with gr.Column():
                with gr.Row():
                    with gr.Column(min_width=200):
                        gr.Markdown(MERGED)
                        answer = gr.Markdown(elem_id="answer", container=True, min_height=60)
                        numbers = gr.Markdown(elem_id="numbers", elem_classes="numbers")
                    with gr.Column(min_width=200, visible=False) as beside:
                        gr.Markdown(PLAIN)
                        plain = gr.Markdown(elem_id="plain", container=True, min_height=60)
                        plain_numbers = gr.Markdown(elem_id="plain-numbers", elem_classes="numbers")
                layer = gr.Slider(0, desk.feature, desk.feature, step=1, label="Layer", elem_id="layer")
                where = gr.Markdown(EMPTY, elem_id="where")
                with gr.Row():
                    overlay, energy = (
                        gr.Image(
                            label=label, elem_id=label.lower(), interactive=False, format="png",
                            buttons=["download", "fullscreen"], min_width=200,
                        )
                        for label in ("Overlay", "Energy")
                    )  # fmt: skip

        def ask(path: str | None, words: str, name: str, keep: float, both: bool) -> Iterator[tuple]:
            yield from _refusing(_asked(desk, path, words, name, keep, both))

        outputs = [answer, numbers, plain, plain_numbers, beside, shown, layer]
        pressed = gr.on(
            [asked.click, question.submit], ask, [picture, question, method, share, compare], outputs,
            concurrency_limit=1, concurrency_id="model", api_name="ask",
        )  # fmt: skip
        drawn = [overlay, energy, where]
        pressed.then(_look, [shown, layer], drawn, api_name=False)
        layer.release(_look, [shown, layer], drawn, api_name="look")
        for chosen in (method.change, share.change):
            chosen(lambda name, keep: _amount(desk, name, keep), [method, share], amount, api_name=False)
    return page.queue(max_size=WAITING)


def launch(page: gr.Blocks, host: str, port: int, megabytes: int, wait: bool = True) -> str:
    """Serves the page and gives its address back, at once or, with `wait`, when it was ended.

    Args:
        page: what `build` made.
        host: the address to listen at.
        port: a free one.
        megabytes: of an upload, at most.
        wait: until somebody ends it.
    """
    fonts = ["system-ui", "sans-serif"]  # none from the web
    theme = gr.themes.Default(font=fonts, font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, theme=theme, css=CSS, max_file_size=f"{megabytes}mb",
        show_error=True, ssr_mode=False, prevent_thread_lock=not wait, enable_monitoring=False,
    )  # fmt: skip
    return address


def _asked(desk: Desk, path: str | None, words: str, name: str, keep: float, both: bool) -> Iterator[tuple]:
    """What changes on the page while an answer is worked out."""
    config = _config(desk, name, keep)
    picture = open_picture(path) if path else None
    same = gr.skip()
    yield "", "", "", "", gr.update(visible=both), None, same
    for found in desk.ask(picture, words, config):
        yield found.text, _line(found), same, same, same, same, same
    if picture is not None:
        seen = desk.study(picture, words, config)
        last = len(_points(seen)) - 1
        yield same, same, same, same, same, seen, gr.update(maximum=last, value=last)
    if both:
        for found in desk.ask(picture, words, None):
            yield same, same, found.text, _line(found), same, same, same


def _refusing(steps: Iterator[tuple]) -> Iterator[tuple]:
    """Shows what was wrong with a question in words."""
    try:
        yield from steps
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _look(seen: Study | None, layer: int) -> tuple[Any, Any, str]:
    """The pictures at a point of the model."""
    if seen is None:
        return None, None, EMPTY
    points = _points(seen)
    point = points[min(layer, len(points) - 1)]
    if point is None:
        return panels.plain(seen, SIZE).picture, None, f"the picture: {seen.history.patches} patches"
    tokens = panels.tokens(seen, point, SIZE)
    energy = panels.energy(seen, point, SIZE, borrowed=True)
    before = seen.history.merge(point.place, point.layer).before.tokens
    said = f"{point.head}: **{tokens.caption}** of {seen.history.patches} patches"
    return tokens.picture, energy.picture, f"{said}; energy of the {before} in front"


def _points(seen: Study) -> list[Point | None]:
    """Where one can look: the picture, behind every layer that merges, and what the language model gets."""
    found: list[Point | None] = [None]
    for merge in seen.history.merges:
        head = {
            "tower": f"behind layer {merge.layer + 1} of the tower", "prefix": "behind the projector",
            "decoder": f"in the language model, layer {merge.layer}",
        }[merge.place]  # fmt: skip
        found.append(Point(head, merge.place, merge.layer))
    return found


def _line(found: Answer) -> str:
    """The numbers of an answer that is whole."""
    if found.numbers is None:
        return ""
    return f"{found.numbers.line()} · {found.gflops:.2f} GFLOPs"


def _amount(desk: Desk, name: str, keep: float) -> str:
    """How many tokens the choices leave."""
    config = _config(desk, name, keep)
    tokens = config.tokens_at(desk.patches, desk.feature)
    inside = min(config.decoder.values(), default=tokens)
    return f"{min(tokens, inside)} image tokens of {desk.patches}, merged in the {METHODS[name].places[0]}"


def _config(desk: Desk, name: str, keep: float) -> MergeConfig:
    """A method in the place its authors have it."""
    return MergeConfig(method=name, **at_home(name, {"ratio": keep}, desk.patches, desk.feature))
