"""`llava-pitome chat`: its options, and reading lines."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from llava_pitome.api import applied
from llava_pitome.cli.model_options import MODEL_OPTIONS, check_model, load
from llava_pitome.cli.options import Option, add_flags, merge_config, merge_options, number, whole
from llava_pitome.image_io import open_image
from llava_pitome.video_io import FRAMES, read_video

OPTIONS = {
    "image": Option([], str, "a file", "an image for the first question; may be repeated", repeats=True),
    "video": Option(
        [], str, "a file", "a video for the first question (needs PyAV); may be repeated", repeats=True
    ),
    "frames": Option(FRAMES, whole(1), "a whole number from 1", "frames of a video, evenly spaced in time"),
    "max_new_tokens": Option(512, whole(1), "a whole number from 1", "the most tokens of an answer"),
    "temperature": Option(0.0, number(0), "a number from 0", "of sampling; 0 takes the likeliest token"),
    **MODEL_OPTIONS,
    **merge_options(),
}


def describe(subparsers: Any, name: str) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        name,
        description="A conversation with a LLaVA about images, in the terminal or from a pipe: one question "
        "a line. The line /help lists the commands.",
    )
    add_flags(parser, OPTIONS)


def run(options: argparse.Namespace) -> int:
    """Runs the conversation.

    Raises:
        ValueError: options that contradict each other, an image or video that cannot be opened, or, from a
            pipe, a line that is not allowed.
    """
    from llava_pitome.cli.chat.conversation import Conversation
    from llava_pitome.cli.chat.terminal import Terminal

    check_model(options)
    config = merge_config(vars(options))
    _check_videos(options)
    images = [open_image(file) for file in options.image]
    videos = [read_video(file, options.frames) for file in options.video]
    model, processor = load(options, config)
    conversation = Conversation(model, processor, options.max_new_tokens, options.temperature)
    for image in images:
        conversation.add_image(image)
    for video in videos:
        conversation.add_video(video)
    interactive = sys.stdin.isatty()
    terminal = Terminal(conversation, applied(model), frames=options.frames)
    if interactive:
        terminal.write(f"{options.model}: one question a line; /help lists the commands\n")
    terminal.run(_typed_lines() if interactive else sys.stdin, interactive)
    return 0


def _check_videos(options: argparse.Namespace) -> None:
    """Raises ValueError for videos beside images, or with a model that takes none."""
    if not options.video:
        return
    from llava_pitome.models.image_counts import counts_of_checkpoint

    if options.image:
        raise ValueError("--image and --video are not allowed together: a prompt holds images or videos")
    if not counts_of_checkpoint(options.model).takes_videos:
        raise ValueError(
            f"--video is not allowed with --model {options.model}, which takes no videos; LLaVA-NeXT-Video "
            "and LLaVA-OneVision do"
        )


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal, with line editing and history, until Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401  # input() uses it once it is imported

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
