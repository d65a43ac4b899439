"""Images from any source: size-checked, complete, upright, RGB.

All files that users give to commands, training and servers are opened by `open_image`. Images that others
opened, such as those of lmms-eval's tasks, go through `to_rgb`, so that the same file has the same pixels
everywhere. Pillow and numpy are imported when an image is opened.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26  # 67 million, 8192 x 8192: larger than a phone's images; 192 MiB as RGB
MAX_ASPECT = 50  # longer side over shorter side; processors resize the shorter one to the tower's input size
# what browsers and cameras write; no format whose reader starts other programs, such as EPS
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM")
DECODING_ERRORS = (  # pillow raised the first four on damaged files; its readers contain the others
    OSError, SyntaxError, ValueError, RuntimeError, EOFError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
GREY_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")  # pillow's modes
GREY_32_BIT = "I"  # pillow's mode for greys of 8 bits in an int32 array, and of 16 bits in some files
GREY_32_BIT_FILES = ("PNG", "PPM")  # whose greys have 16 bits where pillow opens them as GREY_32_BIT
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values that exchange height and width
BACKGROUND = (255, 255, 255, 255)  # of transparent images


def open_image(
    source: "str | os.PathLike | bytes | bytearray | memoryview", max_pixels: int = MAX_PIXELS
) -> "Image.Image":
    """The image in a file or in the bytes of one: RGB, upright, transparency on white.

    The first frame of an animation. The size is read from the file's header, so that one that is too large is
    never decoded.

    Args:
        source: the path of a file, or its content in bytes.
        max_pixels: the most pixels (width times height). Pillow itself refuses more than 179 million.

    Raises:
        ValueError: the source is neither a path nor bytes, or the file is missing or cannot be read, is not
            in one of FORMATS, is truncated or damaged, has too many pixels, or is too narrow; the message
            names the file and the reason.
        RuntimeError: another package set LOAD_TRUNCATED_IMAGES, with which pillow completes truncated files.
    """
    with _identified(source, max_pixels) as (image, name):
        return to_rgb(image, name, max_pixels)


def image_size(
    source: "str | os.PathLike | bytes | bytearray | memoryview", max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width in pixels of the image that `open_image` returns, from the file's header alone.

    An orientation that a PNG file names after its pixels is not found.

    Args:
        source: as for `open_image`.
        max_pixels: as for `open_image`.

    Raises:
        ValueError: as for `open_image`, but for damage after the header.
    """
    from PIL import Image

    with _identified(source, max_pixels) as (image, name):
        _check_size(*image.size, name, max_pixels)
        width, height = image.size
        if image.format != "TIFF":  # pillow turns these itself
            try:
                orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # PNG's own decodes the image
            except DECODING_ERRORS as error:
                raise ValueError(f"{name} has damaged EXIF data: {error}") from error
            if orientation in SIDEWAYS:
                width, height = height, width
    return height, width


@contextmanager
def _identified(
    source: "str | os.PathLike | bytes | bytearray | memoryview", max_pixels: int
) -> "Iterator[tuple[Image.Image, str]]":
    """The image of a source, of which only the header is read, and its name in error messages."""
    from PIL import Image

    _check_settings()
    is_bytes = isinstance(source, bytes | bytearray | memoryview)
    if not is_bytes and not isinstance(source, str | os.PathLike):
        raise ValueError(f"the image is a {type(source).__name__}; give the path of a file, or its bytes")
    name = "the image" if is_bytes else os.fsdecode(source)
    with closing(io.BytesIO(source) if is_bytes else _open_file(name)) as file:
        try:
            image = _identify(file, name)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name} has too many pixels; allowed are {max_pixels:,}: {error}") from error
        with image:
            yield image, name


def to_rgb(image: "Image.Image", name: str = "the image", max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """An image that pillow opened, as `open_image` returns it: RGB, upright, transparency on white.

    An image that is so already keeps its pixels. Pillow's own `convert("RGB")` ignores the EXIF orientation,
    shows what transparency hides, and clips 16-bit greys at 255. Greys of pillow's mode "I", which holds
    integers of 32 bits, have 8 bits where none exceeds 255 and 16 bits otherwise; those of a PNG or PPM file
    have 16 bits in any case.

    Args:
        image: of any mode; it is not changed.
        name: of the image in error messages.
        max_pixels: as for `open_image`.

    Raises:
        ValueError: it is no pillow image, its file is truncated or damaged, it has too many pixels, it is
            too narrow, or its values are no colours.
        RuntimeError: as for `open_image`, where the file was not read completely before.
    """
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is a {type(image).__name__}; it must be a PIL.Image.Image")
    if getattr(image, "tile", None):  # the file is decoded when the image is loaded
        _check_settings()
    _check_size(*image.size, name, max_pixels)
    try:
        image.load()
    except DECODING_ERRORS as error:
        state = "truncated" if "truncated" in str(error).lower() else "damaged or truncated"
        raise ValueError(f"{name} is {state}: {error}") from error
    try:
        upright = ImageOps.exif_transpose(image)
    except DECODING_ERRORS as error:
        raise ValueError(f"{name} has damaged EXIF data: {error}") from error
    return _to_rgb(upright, name, _has_16_bits(image))


def is_changed_by_convert(image: "Image.Image") -> bool:
    """Whether pillow's own `convert("RGB")` of an image gives other pixels than `to_rgb`."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
        if image.mode == GREY_32_BIT:
            _check_settings()  # its values are read
            has_other_greys = _has_16_bits(image) or image.getextrema()[0] < 0
        else:
            has_other_greys = _has_16_bits(image)
    except DECODING_ERRORS:
        return True  # `to_rgb` raises
    return has_other_greys or image.has_transparency_data or orientation != 1


def _has_16_bits(image: "Image.Image") -> bool:
    """Whether the values of a grey image go up to 65535 instead of 255."""
    if image.mode == GREY_32_BIT:
        return image.format in GREY_32_BIT_FILES or image.getextrema()[1] > 255
    return image.mode in GREY_16_BIT


def _check_settings() -> None:
    """Raises RuntimeError where pillow would complete truncated files."""
    from PIL import ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides that an image is truncated; some package "
            "set it: set it to False again"
        )


def _open_file(name: str) -> IO[bytes]:
    """A file, opened for reading.

    Raises:
        ValueError: it is missing, no regular file, or cannot be read, or its name is not allowed.
    """
    path = Path(name)
    try:
        file = None if path.exists() and not path.is_file() else path.open("rb")
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; give an image file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # such as a null byte
        raise ValueError(f"{name!r} is no file name: {error}") from error
    if file is None:
        raise ValueError(f"{path} is no file; give an image file")
    return file


def _identify(file: IO[bytes], name: str) -> "Image.Image":
    """The image in a file, of which only the header is read.

    Raises:
        ValueError: the file is in none of FORMATS, or its header is damaged.
    """
    from PIL import Image

    Image.init()
    try:
        return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])  # AVIF from pillow 11.3
    except Image.UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(8)
        raise ValueError(
            f"{name} is no image: {repr(start) if start else 'an empty file'} is not the start of "
            f"{', '.join(FORMATS)}"
        ) from error
    except DECODING_ERRORS as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    """Raises ValueError for a size that is not allowed."""
    pixels = width * height
    if pixels > max_pixels:
        raise ValueError(
            f"{name} has too many pixels: {width} x {height} are {pixels:,}, allowed are {max_pixels:,}"
        )
    if not pixels:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{name} is too narrow: {width} x {height}; one side may be at most {MAX_ASPECT} times the other"
        )


def _to_rgb(image: "Image.Image", name: str, has_16_bits: bool) -> "Image.Image":
    """The image in RGB.

    Args:
        image: of any mode.
        name: of the image in error messages.
        has_16_bits: see `_has_16_bits`; an upright copy no longer knows its file's format.

    Raises:
        ValueError: its values are no colours.
    """
    import numpy as np
    from PIL import Image

    if image.mode in (*GREY_16_BIT, GREY_32_BIT):  # pillow's conversion would clip 16 bits at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{name} has values from {grey.min()} to {grey.max()}; greys may have 8 or 16 bits"
            )
        clear = image.info.get("transparency")  # the one transparent grey of a PNG
        visible = grey >> 8 if has_16_bits else grey
        if clear is not None:
            visible = np.where(grey == clear, BACKGROUND[0], visible)
        return Image.fromarray(visible.astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # which pillow converts to nothing else
        image = image.convert("LA")
    if image.mode == "F":
        raise ValueError(f"{name} has floating-point values, which are no colours; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")


def with_detail_of(image: "Image.Image", side: int) -> "Image.Image":
    """The image with no more detail than a square of `side` pixels has, in its own size."""
    from PIL import Image

    return image.resize((side, side), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
