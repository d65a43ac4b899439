"""Pictures of embedded scenes as a request carries them."""

import base64
import io


def data_url(seed: int, side: int) -> str:
    """A scene's picture, side x side pixels, as a PNG in a data URL; another one for every seed."""
    from PIL import Image

    from llava_pitome.embedded.render import render
    from llava_pitome.embedded.scenes import scene

    file = io.BytesIO()
    Image.fromarray(render(scene(seed))).resize((side, side)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
