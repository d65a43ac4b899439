"""Frames of a video file, by PyAV: sampled evenly in time, upright, RGB.

PyAV, numpy and Pillow are imported when a video is read.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_pitome.image_io import to_rgb

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 8  # of a video, where nothing says how many


def read_video(source: str | os.PathLike, frames: int = FRAMES) -> "list[Image.Image]":
    """Frames of a video file, in order: those that are shown at evenly spaced times, first and last included.

    The times are those that the file gives its frames, so that a variable frame rate makes no difference. A
    frame that is shown at several of the times is returned once, and a video of fewer frames whole. A single
    frame is the one in the middle.

    Args:
        source: the path of a file.
        frames: the most frames.

    Raises:
        ValueError: `frames` is not a whole number from 1, PyAV is not installed, or the file is missing, has
            no video, or cannot be decoded; or a frame has a size that `image_io.to_rgb` refuses.
    """
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise ValueError(f"frames={frames!r} is not allowed: it must be a whole number from 1")
    check_available()
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"the video is a {type(source).__name__}; give the path of a file")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give a video file")
    import av

    try:  # an open file: a path could be read as a URL
        with path.open("rb") as file, closing(av.open(file)) as container:
            return _sampled(container, str(path), frames)
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no video, or damaged: {error.strerror}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_available() -> None:
    """Raises ValueError where PyAV is not installed."""
    if find_spec("av") is None:
        raise ValueError("videos need PyAV, which is not installed: pip install 'llava-pitome[video]'")


def _sampled(container: Any, name: str, count: int) -> "list[Image.Image]":
    """At most `count` frames of an open container."""
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({"a cover" if s.type == "video" else s.type for s in container.streams})
        raise ValueError(f"{name} holds no video, but {', '.join(kinds) or 'nothing'}")
    stream = streams[0]
    stream.thread_type = "AUTO"
    times = _times(container, stream)
    if not times:
        raise ValueError(f"{name} holds a video without frames")
    wanted = iter(_evenly(times, count))
    container.seek(0, stream=stream, backward=True, any_frame=False)
    images, shown, time = [], None, next(wanted)
    for at, frame in _decoded(container, stream):
        while time is not None and shown is not None and at > time:
            images.append(shown)
            time = next(wanted, None)
        if time is None:
            break
        shown = frame
    if shown is None:
        raise ValueError(f"{name} is damaged: none of its {len(times)} frames can be decoded")
    if time is not None:
        images.append(shown)
    return [_image(frame, name) for i, frame in enumerate(images) if not i or frame is not images[i - 1]]


def _times(container: Any, stream: Any) -> list[int]:
    """When each frame of a stream is shown, ascending, in the stream's unit; its number where none says."""
    packets = [packet.pts for packet in container.demux(stream) if packet.size]
    return list(range(len(packets))) if None in packets else sorted(packets)


def _evenly(times: list[int], count: int) -> list[int]:
    """At most `count` evenly spaced times from the first to the last, rounded down to the unit."""
    first, length = times[0], times[-1] - times[0]
    if len(times) <= count:
        return times
    if count == 1:
        return [first + length // 2]
    return [first + length * i // (count - 1) for i in range(count)]


def _decoded(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """The frames of a stream with the times at which they are shown."""
    for number, frame in enumerate(container.decode(stream)):
        yield number if frame.pts is None else frame.pts, frame


def _image(frame: Any, name: str) -> "Image.Image":
    """A decoded frame as an upright image in RGB."""
    from PIL import Image

    if frame.is_corrupt:
        raise ValueError(f"{name} is damaged: the frame at {frame.time:.2f} s cannot be decoded completely")
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    image, angle = frame.to_image(), round(frame.rotation) % 360
    if angle and angle not in turns:
        raise ValueError(f"{name} is rotated by {angle} degrees; allowed are 0, 90, 180 and 270")
    return to_rgb(image.transpose(turns[angle]) if angle else image, f"a frame of {name}")
