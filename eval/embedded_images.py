"""Images of the embedded scenes, and images as data URLs."""

import base64
import io

from PIL import Image

from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene


def embedded_image(seed: int) -> Image.Image:
    """The image of the embedded scene of a seed."""
    return Image.fromarray(render(scene(seed)))


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return png_url(file.getvalue())


def png_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
