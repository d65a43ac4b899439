"""Where the page listens and what it looks like."""

import gradio as gr
from starlette.middleware import Middleware

from llava_pitome.cli.web.gate import Gate

CSS = ".numbers {font-size: 0.9em; color: var(--body-text-color-subdued);} footer {display: none !important;}"


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
    most = megabytes * 2**20
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=False, theme=theme, css=CSS, max_file_size=most,
        show_error=True, ssr_mode=False, prevent_thread_lock=not wait, enable_monitoring=False,
        mcp_server=False, run_history=False, app_kwargs={"middleware": [Middleware(Gate, most=most)]},
    )  # fmt: skip
    return address
