"""Images of the embedded scenes, and images as data URLs."""

import base64
import io

from PIL import Image

from llava_pitome.embedded import NAME
from llava_pitome.embedded.dataset import SCENES
from llava_pitome.embedded.render import render


def embedded_image(seed: int, model: str = NAME) -> Image.Image:
    """The image of the scene of a seed, of those for one of the embedded models."""
    make_scene, _ = SCENES[model]
    return Image.fromarray(render(make_scene(seed)))


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return png_url(file.getvalue())


def png_url(png: bytes) -> str:
    """A PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
