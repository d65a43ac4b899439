"""Image files: which are opened, how they are converted, and which are refused with a reason."""

import io
import os
import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from llava_pitome.image_io import FORMATS, MAX_PIXELS, image_size, open_image

RNG = np.random.default_rng(0)
COLOURED = Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((18, 12))


def saved(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png(width, height):
    """A PNG with a header of some size and no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format_opens_from_a_file_and_from_bytes(kind, tmp_path):
    data = saved(COLOURED, kind)
    (tmp_path / "image").write_bytes(data)  # without an ending
    found = [open_image(source) for source in (data, tmp_path / "image", str(tmp_path / "image"))]
    for image in found:
        assert image.mode == "RGB" and image.size == COLOURED.size
        assert image.tobytes() == found[0].tobytes()
    if kind in ("PNG", "BMP", "TIFF", "PPM"):  # the others are lossy
        assert found[0].tobytes() == COLOURED.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_every_mode_of_a_png_becomes_rgb(mode):
    image = Image.new(mode, (4, 3), 0 if mode in ("1", "L", "P", "I;16") else (0,) * len(mode))
    found = open_image(saved(image))
    assert found.mode == "RGB" and found.size == (4, 3)


def test_greys_of_16_bits_are_scaled():
    wide = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.asarray(open_image(saved(wide, kind)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_becomes_rgb():
    found = open_image(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert np.asarray(found).min() > 250


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_transparency_becomes_white(kind):
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (np.asarray(open_image(saved(clear, kind))) == 255).all()
    half = open_image(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128))))
    assert np.asarray(half).flatten().tolist() == [127] * 192


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    found = open_image(saved(image, transparency=0))
    assert np.asarray(found)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_upright(orientation):
    """By the definition of the EXIF orientations, without pillow's own transpositions."""
    upright = np.array([[10, 60, 110], [160, 210, 255]], np.uint8)
    turns = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(turns[orientation])), exif=exif)
    assert np.array_equal(np.asarray(open_image(data))[..., 0], upright)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 5, 6, 8])
def test_the_size_in_the_header_is_that_of_the_opened_image(kind, orientation, monkeypatch):
    options = {}
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    data = saved(COLOURED, kind, **options)
    opened = open_image(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("the image is decoded"))
    assert image_size(data) == (opened.height, opened.width)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(9000, 9000), "too many pixels"),
        (png(600, 10), "too narrow"),
        (b"hello", "is no image"),
        (saved(COLOURED)[:20], "damaged|no image"),
    ],
)
def test_a_size_that_is_not_allowed_is_refused_by_the_header(data, message):
    with pytest.raises(ValueError, match=message):
        image_size(data)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), c) for c in ((255, 0, 0), (0, 0, 255))]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((2, 2)) == (255, 0, 0)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png does not exist"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=f"{tmp_path} is no file"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="is no file"):
        open_image("/dev/zero")  # has no end


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_other_files_are_refused_with_the_allowed_formats(data, tmp_path):
    (tmp_path / "notes.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"notes\.png is no image: .* is not the start of JPEG, PNG"):
        open_image(tmp_path / "notes.png")


def test_formats_whose_readers_start_programs_are_not_allowed():
    assert not {"EPS", "WMF", "FPX", "MIC"} & set(FORMATS)


def test_too_many_pixels_are_refused_with_both_numbers():
    data = saved(COLOURED)
    assert open_image(data, max_pixels=18 * 12).size == (18, 12)
    with pytest.raises(ValueError, match="too many pixels: 18 x 12 are 216, allowed are 215"):
        open_image(data, max_pixels=215)


@pytest.mark.parametrize("side", [8193, 12000, 60000])
def test_decompression_bombs_are_refused_by_their_header(side, monkeypatch, recwarn):
    def decode(*_args):
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    with pytest.raises(ValueError, match=f"too many pixels.*{MAX_PIXELS:,}"):
        open_image(png(side, side))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated_files_are_refused(kind):
    big = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = saved(big, kind)
    for share in (0.5, 0.8, 0.95):
        with pytest.raises(ValueError, match=r"the image is (damaged|truncated|no image)"):
            open_image(data[: int(len(data) * share)])


def test_the_setting_that_hides_truncation_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is on"):
        open_image(saved(COLOURED))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_gives_an_image_or_a_value_error(kind):
    """Any other error would be a server's own failure."""
    rng = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    data, refused = saved(COLOURED, kind, **options), 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(rng.choice((min(len(data), 64), len(data))))] = rng.randrange(256)
        try:
            assert open_image(bytes(damaged[: rng.choice((None, rng.randrange(len(data))))])).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("the image")
            refused += 1
    assert refused > 50


def test_values_that_are_no_colours_are_refused():
    with pytest.raises(ValueError, match="floating-point values, which are no colours"):
        open_image(saved(Image.new("F", (4, 4)), "TIFF"))
    with pytest.raises(ValueError, match="values from 70000 to 70000; greys may have 8 or 16 bits"):
        open_image(saved(Image.new("I", (4, 4), 70000), "TIFF"))


@pytest.mark.parametrize("name", ["a\0b", "\0", "a\ud800b.png"])
@pytest.mark.parametrize("kind", [str, Path])
def test_what_cannot_be_a_file_name_is_refused_by_its_name(name, kind):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no file name")):
        open_image(kind(name))


@pytest.mark.parametrize(
    "source", [None, 5, 0.5, ["a.png"], {"path": "a.png"}, COLOURED, np.zeros((4, 4, 3))]
)
def test_a_source_of_another_type_is_refused(source):
    with pytest.raises(
        ValueError, match=f"is a {type(source).__name__}; give the path of a file, or its bytes"
    ):
        open_image(source)


def test_a_source_may_be_any_path_or_bytes(tmp_path):
    data = saved(COLOURED)
    (tmp_path / "image.png").write_bytes(data)
    (entry,), (encoded,) = os.scandir(tmp_path), os.scandir(os.fsencode(tmp_path))
    for source in (bytearray(data), memoryview(data), entry, encoded):
        assert open_image(source).tobytes() == COLOURED.tobytes()
