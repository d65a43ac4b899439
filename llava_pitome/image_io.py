"""Opening picture files that come from anywhere: small enough, whole, upright, in colour.

The only file that opens pictures for people: chat, web page, server and `draw` all come here. Needs pillow,
and numpy for 16-bit pictures, which are imported when a picture is opened.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26  # 67 million, 8192 x 8192: what phones take fits, and is 192 MiB in colour
LONGEST = 50  # times the shorter side; processors stretch that side to the tower's, and the other with it
# what browsers and cameras write; no format whose reader starts other programs, such as EPS
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM")
BROKEN = (  # the first four were met when files were damaged, the others stand in pillow's readers
    OSError, SyntaxError, ValueError, RuntimeError, EOFError, OverflowError, struct.error, zlib.error,
)  # fmt: skip
WIDE = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # pillow's modes of 16-bit greys
BEHIND = (255, 255, 255)  # what shows through where a picture is transparent


def open_image(source: "str | Path | bytes", max_pixels: int = MAX_PIXELS) -> "Image.Image":
    """The picture in a file, or in the bytes of one: RGB, upright, transparency on white.

    Of animations it is the first frame. The size is known from the file's head, so that nothing is decoded
    of a picture that is too large.

    Args:
        source: a file's path, or what would be in it.
        max_pixels: width times height that are allowed. Pillow itself refuses more than 179 million.

    Raises:
        ValueError: there is no such file, it cannot be read, is no picture in one of FORMATS, is truncated or
            damaged, has too many pixels, or is too narrow; the message names the file and the reason.
        RuntimeError: another package told pillow to fill truncated pictures up.
    """
    from PIL import Image, ImageFile

    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so that truncated pictures cannot be told from whole "
            "ones; some package set it: set it to False again"
        )
    name = "the picture" if isinstance(source, bytes) else str(source)
    with io.BytesIO(source) if isinstance(source, bytes) else _opened(Path(source)) as data:
        try:
            found = _recognised(data, name)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name} has too many pixels; allowed are {max_pixels:,}: {error}") from error
        with found:
            _check(found, name, max_pixels)
            return _decoded(found, name)


def _opened(path: Path) -> IO[bytes]:
    """A file, to be read.

    Raises:
        ValueError: it is not there, no file, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file; give a picture file")
        return path.open("rb")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there; give a picture file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _recognised(data: IO[bytes], name: str) -> "Image.Image":
    """The picture in a file, of which only the head is read.

    Raises:
        ValueError: there is none.
    """
    from PIL import Image

    Image.init()
    try:
        return Image.open(data, formats=[f for f in FORMATS if f in Image.OPEN])  # AVIF from pillow 11.3
    except Image.UnidentifiedImageError as error:
        data.seek(0)
        head = data.read(8)
        raise ValueError(
            f"{name} is no picture: {repr(head) if head else 'an empty file'} is no beginning of "
            f"{', '.join(FORMATS)}"
        ) from error
    except BROKEN as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _check(found: "Image.Image", name: str, max_pixels: int) -> None:
    """Raises ValueError for a size that is not allowed."""
    width, height = found.size
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has too many pixels: {width} x {height} are {width * height:,}, allowed are "
            f"{max_pixels:,}"
        )
    if not width * height:
        raise ValueError(f"{name} has no pixels: it is {width} x {height}")
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(
            f"{name} is too narrow: {width} x {height}; one side may be {LONGEST} times the other at most"
        )


def _decoded(found: "Image.Image", name: str) -> "Image.Image":
    """The pixels of a picture that was opened.

    Raises:
        ValueError: there are fewer than its head says, they are damaged, or no colours.
    """
    from PIL import ImageOps

    try:
        found.load()
    except BROKEN as error:
        what = "truncated" if "truncated" in str(error).lower() else "damaged or truncated"
        raise ValueError(f"{name} is {what}: {error}") from error
    try:
        upright = ImageOps.exif_transpose(found)
    except BROKEN as error:
        raise ValueError(f"{name} has damaged EXIF data: {error}") from error
    return _coloured(upright, name)


def _coloured(picture: Any, name: str) -> "Image.Image":
    """The picture in RGB.

    Raises:
        ValueError: its numbers are no colours.
    """
    import numpy as np
    from PIL import Image

    if picture.mode in WIDE:  # pillow would cut 16 bits off at 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(
                f"{name} holds numbers from {grey.min()} to {grey.max()}; greys may have 8 or 16 bits"
            )
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError(f"{name} holds fractions, which are no colours; save it with 8 or 16 bits")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    clear = picture.convert("RGBA")
    behind = Image.new("RGBA", clear.size, (*BEHIND, 255))
    return Image.alpha_composite(behind, clear).convert("RGB")
