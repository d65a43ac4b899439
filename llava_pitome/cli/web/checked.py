"""A Gradio page that looks at files before Gradio does, which fetches addresses and opens pictures itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava_pitome.cli.web import received
from llava_pitome.cli.web.pressing import refusal

HOUR = 3600  # seconds


class Checked(gr.Blocks):
    """A page whose functions are called only with files that were uploaded to it, or are its examples.

    Functions that take pictures must be registered with `preprocess=False`, and open the files themselves.
    Files that nobody used for an hour are deleted.
    """

    def __init__(self, title: str):
        """An empty page."""
        super().__init__(title=title, analytics_enabled=False, delete_cache=(HOUR // 6, HOUR))
        if not hasattr(gr.Blocks, "preprocess_data"):
            raise RuntimeError(
                f"gradio {gr.__version__} no longer has Blocks.preprocess_data, where the page checks files: "
                "install gradio 6.31"
            )

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **named: Any) -> list[Any]:
        """Gradio's, which fetches and opens what is named in its inputs, behind a check of them.

        Raises:
            gr.Error: a file that is not allowed, an object where none belongs, or too few or many values.
        """
        try:
            inputs = self._checked(block_fn.inputs, inputs)
        except ValueError as error:
            raise refusal(error) from error
        return await super().preprocess_data(block_fn, inputs, *rest, **named)

    def _checked(self, blocks: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """What Gradio may see: of files the path alone.

        Raises:
            ValueError: as `preprocess_data` says it.
        """
        if len(values) != len(blocks):
            raise ValueError(f"{len(values)} values are given where {len(blocks)} are asked for")
        folder, most = Path(self.GRADIO_CACHE), self.max_file_size or float("inf")
        found: list[Any] = []
        for block, value in zip(blocks, values):
            if isinstance(block, gr.Image):
                file = received.upload(value, folder, most)
                found.append(file and {"path": str(file), "meta": {"_type": "gradio.FileData"}})
            elif isinstance(value, dict | list):
                raise ValueError(f"{block.label} may not be an object or a list")
            else:
                found.append(value)
        return found
