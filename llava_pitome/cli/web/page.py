"""The page: its layout, and what its buttons and sliders do."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from llava_pitome.cli.draw import panels
from llava_pitome.cli.draw.panels import Point
from llava_pitome.cli.web.session import RATIO_STEP, Answer, InitialChoices, Session, merge_config
from llava_pitome.cli.web.uploads import (
    QUESTION,
    CheckedBlocks,
    Merging,
    Question,
    RequestFilter,
    check_layer,
    gradio_errors,
)
from llava_pitome.config import MergeConfig
from llava_pitome.embedded.questions import ask
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.image_io import open_image
from llava_pitome.methods import METHODS
from llava_pitome.tracing import ImageTrace

EXAMPLES = (8, 13, 6, 26, 30, 4)  # seeds of embedded scenes
SIZE = 448  # pixels across a drawn image
MIN_RATIO = 0.7  # of the slider, unless it starts below
QUEUE = 32  # requests that may wait
EMPTY = "*Ask something; what merged is shown here.*"
CSS = ".numbers {font-size: 0.9em; color: var(--body-text-color-subdued);} footer {display: none !important;}"


def write_examples(folder: Path) -> list[tuple[Path, str]]:
    """Writes embedded scenes as PNG files; returns each file with a question about it."""
    examples = []
    for seed in EXAMPLES:
        path = folder / f"scene-{seed}.png"
        Image.fromarray(render(scene(seed))).save(path)
        examples.append((path, ask(scene(seed), 1)[0].text))
    return examples


def launch(page: gr.Blocks, host: str, port: int, megabytes: int, wait: bool = True) -> str:
    """Serves the page and returns its URL, at once or, with `wait`, after it was ended.

    Args:
        page: of `build`.
        host: the address to listen on.
        port: a free one.
        megabytes: of an upload, at most.
        wait: until the page is ended.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
    most = megabytes * 2**20
    _, url, _ = page.launch(
        server_name=host, server_port=port, share=False, theme=theme, css=CSS, max_file_size=most,
        show_error=True, ssr_mode=False, prevent_thread_lock=not wait, enable_monitoring=False,
        mcp_server=False, run_history=False,
        app_kwargs={"middleware": [Middleware(RequestFilter, max_upload=most)]},
    )  # fmt: skip
    return url


def build(session: Session, examples: Sequence[tuple[Path, str]], initial: InitialChoices) -> CheckedBlocks:
    """Returns the page for a model; its files are in the folder of `command.temporary_folder`.

    Args:
        session: runs the model.
        examples: images and questions to choose from.
        initial: what is chosen at first.
    """
    callbacks = Callbacks(session)
    with CheckedBlocks("llava_pitome") as page:
        gr.Markdown("# LLaVA with merged visual tokens")
        if initial.note:
            gr.Markdown(initial.note, elem_id="note")
        trace = gr.State(None)  # which the layer slider shows
        with gr.Row():
            with gr.Column():
                clicked, submitted, inputs = _question_column(examples, initial, callbacks)
            with gr.Column():
                answers = _answers()
                layer = gr.Slider(0, session.layers, session.layers, step=1, label="Layer", elem_id="layer")
                drawings = _drawings()
        answered = gr.on(
            [clicked, submitted], callbacks.ask, inputs, [*answers, trace, layer], preprocess=False,
            concurrency_limit=1, concurrency_id="model", api_name="ask",
        )  # fmt: skip
        layer.release(callbacks.look, [trace, layer], drawings, preprocess=False, api_name="look")
        answered.then(callbacks.look, [trace, layer], drawings, preprocess=False, api_visibility="private")
    return page.queue(max_size=QUEUE)


def _question_column(
    examples: Sequence[tuple[Path, str]], initial: InitialChoices, callbacks: "Callbacks"
) -> tuple[Any, Any, list[Any]]:
    """Builds the left column; returns the events that ask a question, and its inputs."""
    image = gr.Image(
        type="filepath", sources=["upload", "clipboard"], label="Image", height=240, elem_id="image",
        image_mode=None,
    )  # fmt: skip
    question = gr.Textbox(label="Question", elem_id="question", max_length=QUESTION, submit_btn=False)
    with gr.Row():
        method = gr.Dropdown(sorted(METHODS), value=initial.method, label="Method", elem_id="method")
        ratio = gr.Slider(
            min(MIN_RATIO, initial.ratio), 1.0, initial.ratio, step=RATIO_STEP, elem_id="ratio",
            label="Ratio that each tower layer keeps",
        )  # fmt: skip
    amount = gr.Markdown(callbacks.amount(initial.method, initial.ratio), elem_id="amount")
    for changed in (method.change, ratio.change):
        changed(callbacks.amount, [method, ratio], amount, preprocess=False, api_visibility="private")
    compare = gr.Checkbox(label="Answer without merging too", elem_id="compare")
    button = gr.Button("Ask", variant="primary", elem_id="ask")
    gr.Examples(
        [[str(path), text] for path, text in examples],
        [image, question],
        label="Examples",
        examples_per_page=3,
    )
    return button.click, question.submit, [image, question, method, ratio, compare]


def _answers() -> list[Any]:
    """Builds the answers; returns answer and numbers with merging, those without, and the latter's column."""
    with gr.Row():
        with gr.Column(min_width=200):
            gr.Markdown("### Answer with merging")
            answer = gr.Markdown(elem_id="answer", container=True, min_height=60)
            numbers = gr.Markdown(elem_id="numbers", elem_classes="numbers")
        with gr.Column(min_width=200, visible=False) as plain_column:
            gr.Markdown("### Answer without")
            plain = gr.Markdown(elem_id="plain", container=True, min_height=60)
            plain_numbers = gr.Markdown(elem_id="plain-numbers", elem_classes="numbers")
    return [answer, numbers, plain, plain_numbers, plain_column]


def _drawings() -> list[Any]:
    """Builds the drawings; returns overlay, energy, and the line about them."""
    caption = gr.Markdown(EMPTY, elem_id="caption")
    with gr.Row():
        overlay, energy = (
            gr.Image(
                label=label, elem_id=label.lower(), interactive=False, format="png",
                buttons=["download", "fullscreen"], min_width=200,
            )
            for label in ("Overlay", "Energy")
        )  # fmt: skip
    return [overlay, energy, caption]


class Callbacks:
    """The functions of the page, on values as clients send them; the HTTP API takes their parameters' names.

    Every method raises gr.Error for values that are not allowed, before any work.
    """

    def __init__(self, session: Session):
        """Answers with the model of a session."""
        self._session = session

    def ask(self, picture: Any, question: Any, method: Any, ratio: Any, compare: Any) -> Iterator[tuple]:
        """Yields what changes on the page while a question is answered.

        The items are answer, numbers, plain answer, its numbers, the plain column, trace, layer slider.
        """
        with gradio_errors():
            choices = Question(question=question, method=method, ratio=ratio, compare=compare)
            image = open_image(Path(picture["path"]).read_bytes()) if picture else None
            yield from self._answer(image, choices)

    def look(self, trace: ImageTrace | None, layer: Any) -> tuple[Any, Any, str]:
        """Returns overlay, energy and a caption for a point of the model."""
        points = None if trace is None else _points(trace)
        with gradio_errors():
            index = check_layer(layer, self._session.layers if points is None else len(points) - 1)
        return (None, None, EMPTY) if points is None else _draw(trace, points[index])

    def amount(self, method: Any, ratio: Any) -> str:
        """Returns how many tokens the choices leave."""
        with gradio_errors():
            config = self._config(Merging(method=method, ratio=ratio))
            amount = self._session.amount(config)
        return f"{amount}, merged in the {METHODS[config.method].places[0]}"

    def _config(self, choices: Merging) -> MergeConfig:
        session = self._session
        sizes = session.patches, session.layers, session.has_tiles
        return merge_config(choices.method, choices.ratio, *sizes)

    def _answer(self, image: Image.Image | None, choices: Question) -> Iterator[tuple]:
        """Yields as `ask` does."""
        config, same = self._config(choices), gr.skip()
        yield "", "", "", "", gr.update(visible=choices.compare), None, same
        for answer in self._session.answer(image, choices.question, config):
            yield answer.text, _numbers(answer), same, same, same, same, same
        if image is not None:
            trace = self._session.trace(image, choices.question, config)
            last = len(_points(trace)) - 1
            yield same, same, same, same, same, trace, gr.update(maximum=last, value=last)
        if choices.compare:
            for answer in self._session.answer(image, choices.question, None):
                yield same, same, answer.text, _numbers(answer), same, same, same


def _points(trace: ImageTrace) -> list[Point | None]:
    """Returns the points of the slider: the image, and after every merge."""
    points: list[Point | None] = [None]
    for merge in trace.trace.merges:
        title = {
            "tower": f"after layer {merge.layer + 1} of the vision tower", "prefix": "after the projector",
            "decoder": f"after layer {merge.layer + 1} of the language model",
        }[merge.place]  # fmt: skip
        points.append(Point(title, merge.place, merge.layer))
    return points


def _draw(trace: ImageTrace, point: Point | None) -> tuple[Any, Any, str]:
    """Returns the drawings at a point of the model, and a caption."""
    patches = trace.trace.patches
    if point is None:
        return panels.plain(trace, SIZE).image, None, f"the image: {patches} patches"
    tokens = panels.tokens(trace, point, SIZE)
    energy = panels.energy(trace, point, SIZE, fallback=True)
    caption = f"{point.title}: **{tokens.caption}** of {patches} patches"
    if energy.image is not None:
        before = trace.trace.merge(point.place, point.layer).before.tokens
        caption += f"; energy of the {before} tokens before"
    return tokens.image, energy.image, caption


def _numbers(answer: Answer) -> str:
    """Returns the numbers of a complete answer; an empty text before."""
    return "" if answer.stats is None else f"{answer.stats.line()} · {answer.gflops:.2f} GFLOPs"
