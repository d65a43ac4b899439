"""Frames of video files."""

import io
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_pitome.video_io import check_available, read_video

WIDTH, HEIGHT = 64, 48
IDENTITY = b"".join(
    n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
)  # in mp4 files
ONE, MINUS = 1 << 16, (1 << 32) - (1 << 16)
TURNS = {
    90: (0, ONE, 0, MINUS, 0, 0),
    180: (MINUS, 0, 0, 0, MINUS, 0),
    270: (0, MINUS, 0, ONE, 0, 0),
}  # clockwise
TRUE_SIZES = [(64, 48), (63, 47), (17, 33)]


@pytest.fixture
def av():
    return pytest.importorskip("av", reason="PyAV is not installed: pip install 'llava-pitome[video]'")


def grey(image: Image.Image) -> int:
    """The mean grey of the upper left quarter."""
    return round(float(np.asarray(image)[: image.height // 2, : image.width // 2].mean()))


def write(av, path, greys, times=None, size=(WIDTH, HEIGHT), codec="mpeg4", pixels="yuv420p"):
    """Writes a video whose frames are of one grey each, shown at `times` in units of 1/100 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=100)
        stream.width, stream.height = size
        stream.pix_fmt, stream.time_base = pixels, Fraction(1, 100)
        stream.codec_context.time_base = Fraction(1, 100)
        for i, value in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), value, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = (times or range(len(greys)))[i], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def close_to(values):
    return pytest.approx(values, abs=6)  # the codec loses some


@pytest.mark.parametrize(
    "ending, codec", [(".mp4", "mpeg4"), (".mkv", "mpeg4"), (".avi", "mpeg4"), (".webm", "libvpx")]
)
def test_frames_are_those_of_evenly_spaced_times(av, tmp_path, ending, codec):
    path = write(av, tmp_path / f"a{ending}", range(0, 250, 10), codec=codec)
    frames = read_video(path, 4)
    assert [grey(frame) for frame in frames] == close_to([0, 80, 160, 240])
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (WIDTH, HEIGHT))}


@pytest.mark.parametrize(
    "count, shown",
    [(1, [120]), (2, [0, 240]), (3, [0, 120, 240]), (25, range(0, 250, 10)), (80, range(0, 250, 10))],
)
def test_no_more_frames_than_there_are(av, tmp_path, count, shown):
    path = write(av, tmp_path / "a.mp4", range(0, 250, 10))
    assert [grey(frame) for frame in read_video(str(path), count)] == close_to(list(shown))


def test_frames_of_a_variable_rate_are_sampled_by_time(av, tmp_path):
    greys, times = [0, 50, 100, 150, 200], [0, 2, 4, 6, 100]  # the fourth is shown nearly all the time
    path = write(av, tmp_path / "a.mkv", greys, times)
    assert [grey(frame) for frame in read_video(path, 3)] == close_to([0, 150, 200])
    assert [grey(frame) for frame in read_video(path, 4)] == close_to([0, 150, 200])  # once each
    assert [grey(frame) for frame in read_video(path, 5)] == close_to(greys)


@pytest.mark.parametrize("size", TRUE_SIZES)
def test_sizes_need_not_be_even(av, tmp_path, size):
    path = write(av, tmp_path / "a.avi", [30, 60], size=size, codec="ffv1", pixels="yuv444p")
    assert {frame.size for frame in read_video(path)} == {size}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_upright(av, tmp_path, turn):
    path = tmp_path / "a.mp4"
    stored = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    stored[: HEIGHT // 2, : WIDTH // 2] = 220
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    raw, box = path.read_bytes(), path.read_bytes().index(b"tkhd")
    at = raw.index(IDENTITY, box)
    matrix = b"".join(n.to_bytes(4, "big") for n in (*TURNS[turn], 0, 0, 1 << 30))
    path.write_bytes(raw[:at] + matrix + raw[at + len(matrix) :])
    frame = read_video(path)[0]
    expected = Image.fromarray(stored).rotate(-turn, expand=True)  # clockwise
    assert frame.size == expected.size
    assert np.abs(np.asarray(frame, int) - np.asarray(expected, int)).mean() < 8


def test_an_animated_image_is_a_video(av, tmp_path):
    images = [Image.new("RGB", (20, 10), (v, v, v)) for v in (0, 120, 240)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    assert [grey(frame) for frame in read_video(tmp_path / "a.gif")] == close_to([0, 120, 240])


def sound(av, path, codec="pcm_s16le", samples="s16"):
    with av.open(str(path.with_suffix(".mp3" if codec == "libmp3lame" else ".wav")), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format=samples, layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cover(av, path):
    """A sound with a cover picture, which PyAV shows as a video stream."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    content = b"\0image/png\0\3\0" + picture.getvalue()
    frame = b"APIC" + len(content).to_bytes(4, "big") + b"\0\0" + content  # of an ID3 tag
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    sound(av, path.with_suffix(".mp3"), "libmp3lame", "s16p")
    path.write_bytes(b"ID3\3\0\0" + size + frame + path.with_suffix(".mp3").read_bytes())


def cut(av, path):
    write(av, path.with_suffix(".mp4"), [10, 20])
    path.write_bytes(path.with_suffix(".mp4").read_bytes()[:-400])


def emptied(av, path):
    """A container that announces a video stream and holds none of its frames."""
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        container.start_encoding()


def garbled(av, path):
    write(av, path.with_suffix(".avi"), range(0, 200, 10), codec="ffv1", pixels="yuv444p")
    raw = bytearray(path.with_suffix(".avi").read_bytes())
    noise = np.random.default_rng(0).integers(0, 255, len(raw), dtype=np.uint8).tobytes()
    chunk = raw.index(b"00dc", raw.index(b"movi"))
    while raw[chunk : chunk + 4] == b"00dc":
        size = int.from_bytes(raw[chunk + 4 : chunk + 8], "little")
        raw[chunk + 8 : chunk + 8 + size] = noise[:size]
        chunk += 8 + size + size % 2
    path.write_bytes(raw)


FILES = {
    "text": (lambda av, path: path.write_text("no video"), "is no video, or damaged"),
    "empty": (lambda av, path: path.write_bytes(b""), "is no video, or damaged"),
    "sound": (lambda *x: sound(*x) or x[1].with_suffix(".wav").rename(x[1]), "holds no video, but audio"),
    "cover": (cover, "holds no video, but a cover, audio"),
    "cut": (cut, "is no video, or damaged|without frames"),
    "emptied": (emptied, "without frames|is no video, or damaged"),
    "garbled": (garbled, "damaged"),
    "folder": (lambda av, path: path.mkdir(), "is no file; give a video file"),
    "missing": (lambda av, path: None, "does not exist; give a video file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_without_a_video_that_can_be_decoded_raises(av, tmp_path, kind):
    make, reason = FILES[kind]
    path = tmp_path / "file"
    make(av, path)
    with pytest.raises(ValueError, match=f"{path.name}.* {reason}"):
        read_video(path)


def test_a_file_that_may_not_be_read_raises(av, tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    write(av, tmp_path / "a.mp4", [0])
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read: Permission denied"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("source", [b"bytes", 3, None, ["a.mp4"]])
def test_a_source_that_is_no_path_raises(av, source):
    with pytest.raises(ValueError, match=f"the video is a {type(source).__name__}; give the path"):
        read_video(source)


@pytest.mark.parametrize("frames", [0, -1, 1.5, True, "8", None])
def test_a_count_that_is_none_raises(frames):
    with pytest.raises(
        ValueError, match=f"frames={frames!r} is not allowed: it must be a whole number from 1"
    ):
        read_video("a.mp4", frames)


def test_without_pyav_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for call in (check_available, lambda: read_video("a.mp4")):
        with pytest.raises(ValueError, match=r"videos need PyAV.*pip install 'llava-pitome\[video\]'"):
            call()
