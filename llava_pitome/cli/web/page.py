"""The page: what stands where, and what is pressed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava_pitome.cli.web.checked import Checked
from llava_pitome.cli.web.desk import Desk
from llava_pitome.cli.web.pressing import EMPTY, Pressing
from llava_pitome.cli.web.received import QUESTION
from llava_pitome.cli.web.start import LEAST, STEP, Start
from llava_pitome.methods import METHODS

WAITING = 32  # people
MERGED, PLAIN = "### Answer with merging", "### Answer without"


def build(desk: Desk, examples: Sequence[tuple[Path, str]], start: Start) -> Checked:
    """The page for a model, whose files are where `files.folder` says.

    Args:
        desk: asks the model.
        examples: pictures and questions to pick.
        start: what is chosen at first.
    """
    press = Pressing(desk)
    with Checked("llava_pitome") as page:
        gr.Markdown("# LLaVA with merged visual tokens")
        if start.note:
            gr.Markdown(start.note, elem_id="note")
        shown = gr.State(None)  # the study that the layer slider looks into
        with gr.Row():
            with gr.Column():
                asked, submitted, inputs = _question(examples, start, press)
            with gr.Column():
                answers = _answers()
                layer = gr.Slider(0, desk.feature, desk.feature, step=1, label="Layer", elem_id="layer")
                drawn = _drawn()
        pressed = gr.on(
            [asked, submitted], press.ask, inputs, [*answers, shown, layer], preprocess=False,
            concurrency_limit=1, concurrency_id="model", api_name="ask",
        )  # fmt: skip
        layer.release(press.look, [shown, layer], drawn, preprocess=False, api_name="look")
        pressed.then(press.look, [shown, layer], drawn, preprocess=False, api_visibility="private")
    return page.queue(max_size=WAITING)


def _question(
    examples: Sequence[tuple[Path, str]], start: Start, press: Pressing
) -> tuple[Any, Any, list[Any]]:
    """The left column: when it is pressed, when a question is submitted, and what is asked."""
    picture = gr.Image(
        type="filepath", sources=["upload", "clipboard"], label="Picture", height=240, elem_id="picture",
        image_mode=None,
    )  # fmt: skip
    question = gr.Textbox(label="Question", elem_id="question", max_length=QUESTION, submit_btn=False)
    with gr.Row():
        method = gr.Dropdown(sorted(METHODS), value=start.method, label="Method", elem_id="method")
        ratio = gr.Slider(
            min(LEAST, start.ratio), 1.0, start.ratio, step=STEP, elem_id="ratio",
            label="Ratio that each tower layer keeps",
        )  # fmt: skip
    amount = gr.Markdown(press.amount(start.method, start.ratio), elem_id="amount")
    for chosen in (method.change, ratio.change):
        chosen(press.amount, [method, ratio], amount, preprocess=False, api_visibility="private")
    compare = gr.Checkbox(label="Answer without merging too", elem_id="compare")
    asked = gr.Button("Ask", variant="primary", elem_id="ask")
    gr.Examples(
        [[str(path), words] for path, words in examples], [picture, question], label="Examples",
        examples_per_page=3,
    )  # fmt: skip
    return asked.click, question.submit, [picture, question, method, ratio, compare]


def _answers() -> list[Any]:
    """Answer and numbers with merging, those without, and the column that holds the latter."""
    with gr.Row():
        with gr.Column(min_width=200):
            gr.Markdown(MERGED)
            answer = gr.Markdown(elem_id="answer", container=True, min_height=60)
            numbers = gr.Markdown(elem_id="numbers", elem_classes="numbers")
        with gr.Column(min_width=200, visible=False) as beside:
            gr.Markdown(PLAIN)
            plain = gr.Markdown(elem_id="plain", container=True, min_height=60)
            plain_numbers = gr.Markdown(elem_id="plain-numbers", elem_classes="numbers")
    return [answer, numbers, plain, plain_numbers, beside]


def _drawn() -> list[Any]:
    """Overlay, energy, and the line about them."""
    where = gr.Markdown(EMPTY, elem_id="where")
    with gr.Row():
        overlay, energy = (
            gr.Image(
                label=label, elem_id=label.lower(), interactive=False, format="png",
                buttons=["download", "fullscreen"], min_width=200,
            )
            for label in ("Overlay", "Energy")
        )  # fmt: skip
    return [overlay, energy, where]
