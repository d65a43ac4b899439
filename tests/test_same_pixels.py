"""The same file gives the same pixels, or the same refusal, in training, evaluation and every command."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATCHES, make_model
from PIL import Image

from llava_pitome import MergeConfig
from llava_pitome.cli.chat.conversation import Conversation
from llava_pitome.cli.chat.terminal import Terminal
from llava_pitome.cli.draw import command as draw
from llava_pitome.image_io import is_changed_by_convert, open_image, to_rgb
from llava_pitome.integrations.lmms_eval_questions import QuestionReader, as_rgb
from llava_pitome.integrations.serve.images import open_images
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.tracing import trace_image
from train.conversation import BrokenRow
from train.data import ConversationDataset
from train.image_counts import ImageCounts
from train.rows import BrokenRows, JsonRows, TooManyBrokenRows

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (60, 90, 4), dtype=np.uint8)
RGB, RGBA = Image.fromarray(NOISE[..., :3]), Image.fromarray(NOISE)
GREY = Image.fromarray(RNG.integers(0, 65536, (60, 90), dtype=np.uint16))
CONFIG = MergeConfig(tokens=5)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation, image=RGB, kind="JPEG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif)


PALETTE = RGB.quantize(16)
FILES = {
    **{f"jpeg turned {i}": turned(i) for i in range(1, 9)},
    **{f"{kind} turned": turned(6, kind=kind) for kind in ("PNG", "WEBP", "TIFF")},
    "rgb": saved(RGB),
    "rgba": saved(RGBA),
    "rgba turned": turned(5, RGBA, "PNG"),
    "rgba webp": saved(RGBA, "WEBP", lossless=True),
    "la": saved(RGBA.convert("LA")),
    "palette": saved(PALETTE),
    "palette with one transparent colour": saved(PALETTE, transparency=3),
    "palette with alphas": saved(PALETTE, transparency=bytes(range(0, 256, 16))),
    "rgb with a transparent colour": saved(RGB, transparency=RGB.getpixel((3, 3))),
    "grey with a transparent grey": saved(RGB.convert("L"), transparency=RGB.convert("L").getpixel((3, 3))),
    "grey of 16 bits": saved(GREY),
    "grey of 16 bits, tiff": saved(GREY, "TIFF"),
    "grey of 16 bits turned": turned(8, GREY, "PNG"),
    "cmyk": saved(RGB.convert("CMYK"), "JPEG"),
    "cmyk turned": turned(3, RGB.convert("CMYK")),
    "one bit": saved(RGB.convert("1")),
    "animation": saved(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]),
    "animated transparency": saved(RGBA, "GIF", save_all=True, append_images=[RGBA.rotate(180)]),
}  # fmt: skip
REFUSED = {
    "truncated jpeg": (saved(RGB, "JPEG")[:-800], "truncated"),
    "truncated png": (saved(RGB)[:3000], "truncated"),
    "too narrow": (saved(RGB.resize((510, 10))), "too narrow"),
}


def in_memory(path, _processor):
    with Image.open(path) as image:
        return to_rgb(image)


def served(path, _processor):
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return open_images([url], {}, Limits())[0]


def drawn(path, _processor):
    return draw._image(str(path))


def typed_in_the_chat(path, processor):
    conversation = Conversation(make_model(), processor)
    terminal = Terminal(conversation, None, out=io.StringIO())
    terminal.add_image(str(path))
    return conversation._new_images[0]


def added_to_a_conversation(path, processor):
    conversation = Conversation(make_model(), processor)
    conversation.add_image(Image.open(path))
    return conversation._new_images[0]


def asked_on_the_page(path, _processor):
    from llava_pitome.cli.web.page import Callbacks

    found = []

    def answer(image, *_rest):
        found.append(image)
        return iter(())

    session = SimpleNamespace(patches=PATCHES, layers=7, has_tiles=False, answer=answer, trace=None)
    running = Callbacks(session).ask({"path": str(path)}, "what is this", "pitome", 0.9, False)
    next(running)
    with pytest.raises(TypeError):  # the trace, which comes after the answer
        next(running)
    return found[0]


def trained(path, processor):
    """The pixel values of the training data set."""
    turns = [{"from": "human", "value": "<image>\nwhat is this"}, {"from": "gpt", "value": "a cat"}]
    (path.parent / "rows.json").write_text(json.dumps([{"image": path.name, "conversations": turns}]))
    broken = BrokenRows(0, path.parent / "broken.jsonl")
    processor.chat_template = "{% for m in messages %}{% for c in m['content'] %}" + (
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    rows = JsonRows(path.parent / "rows.json")
    counts = ImageCounts(PATCHES, 7)
    return ConversationDataset(rows, path.parent, processor, counts, 100, broken)[0]["pixel_values"]


def evaluated(to_visual):
    """The pixel values of lmms-eval's model for a task whose images a function takes from a document."""

    def evaluated(path, processor):
        import datasets

        from llava_pitome.integrations.lmms_eval import LlavaPitome

        rows = {"image": [{"bytes": path.read_bytes(), "path": None}]}
        split = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
        evaluator = object.__new__(LlavaPitome)  # without loading a checkpoint
        evaluator.task_dict = {"a_task": {"val": split}}
        evaluator.reader = QuestionReader(processor, None, False, False)
        evaluator.model = SimpleNamespace(dtype=torch.float32)
        evaluator.device = torch.device("cpu")
        visual = (lambda _: [str(path)]) if to_visual is Path else to_visual
        request = SimpleNamespace(args=("<image> what", {}, visual, 0, "a_task", "val"))
        processor.chat_template = "{{ messages[0]['content'][0]['text'] }}"
        return evaluator.inputs(evaluator.questions([request]))["pixel_values"]

    return evaluated


IMAGES = [in_memory, served, drawn, typed_in_the_chat, added_to_a_conversation, asked_on_the_page]
PIXELS = {
    "trained": trained,
    "task that converts": evaluated(lambda document: [document["image"].convert("RGB")]),
    "task that does not convert": evaluated(lambda document: [document["image"]]),
    "task that names files": evaluated(Path),
}


@pytest.fixture
def path(tmp_path, request):
    (tmp_path / "image").write_bytes(request.param)
    return tmp_path / "image"


def files(table):
    return pytest.mark.parametrize("path", table.values(), ids=table.keys(), indirect=True)


@files(FILES)
@pytest.mark.parametrize("route", IMAGES, ids=lambda route: route.__name__)
def test_every_route_opens_the_same_pixels(route, path, processor):
    expected, found = open_image(path), route(path, processor)
    assert found.mode == "RGB" and found.size == expected.size
    assert found.tobytes() == expected.tobytes()


@files(FILES)
@pytest.mark.parametrize("route", PIXELS.values(), ids=PIXELS.keys())
def test_training_and_evaluation_see_what_the_processor_makes_of_the_opened_image(route, path, processor):
    image = open_image(path)
    expected = processor(images=image, text="<image> what", return_tensors="pt")["pixel_values"]
    assert torch.equal(route(path, processor), expected)


@files({name: data for name, data in FILES.items() if name not in ("rgb", "jpeg turned 1")})
def test_a_traced_image_is_the_opened_one(path, processor, model):
    expected = trace_image(model, processor, open_image(path), CONFIG).image
    assert trace_image(model, processor, Image.open(path), CONFIG).image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("route", [*IMAGES, *PIXELS.values()], ids=lambda route: route.__name__)
def test_every_route_refuses_the_same_files(name, route, tmp_path, processor):
    data, reason = REFUSED[name]
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        open_image(tmp_path / "image")
    with pytest.raises(Exception, match=reason):  # datasets and the server have classes of their own
        route(tmp_path / "image", processor)


def test_an_unreadable_image_of_training_names_row_and_file(tmp_path, processor):
    (tmp_path / "image").write_bytes(REFUSED["truncated jpeg"][0])
    with pytest.raises(
        TooManyBrokenRows, match=f"row 0: image {tmp_path / 'image'} cannot be read: .*trunc"
    ) as error:
        trained(tmp_path / "image", processor)
    assert isinstance(error.value.__context__, BrokenRow)


def test_an_image_of_a_task_that_cannot_become_rgb_is_named(tmp_path, processor):
    (tmp_path / "image").write_bytes(saved(Image.new("F", (40, 40)), "TIFF"))
    route = evaluated(lambda document: [document["image"]])
    with pytest.raises(ValueError, match="an image of a_task val 0 has floating-point values"):
        route(tmp_path / "image", processor)


@files(FILES)
def test_an_opened_image_keeps_its_pixels(path):
    image = open_image(path)
    assert to_rgb(image).tobytes() == image.tobytes() and not is_changed_by_convert(image)


@files(FILES)
def test_what_convert_changes_is_known(path):
    image, expected = Image.open(path), open_image(path)
    plain = image.convert("RGB")
    assert is_changed_by_convert(image) or plain.tobytes() == expected.tobytes()


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "YCbCr", "LAB", "HSV", "RGBX", "I;16B", "I"])
def test_images_in_memory_of_every_mode_become_rgb(mode):
    found = to_rgb(Image.new(mode, (4, 3)))
    assert found.mode == "RGB" and found.size == (4, 3)
    if mode in ("RGBa", "La", "PA"):  # transparent everywhere
        assert (np.asarray(found) == 255).all()


EIGHT_BITS = np.arange(64, dtype=np.int32).reshape(8, 8) * 4


def int32(values, kind=None, **info):
    """A grey image of pillow's mode "I", in memory or opened from a file of some format."""
    image = Image.fromarray(np.asarray(values, np.int32))
    if kind is None:
        image.info |= info
        return image
    return Image.open(io.BytesIO(saved(image, kind, **info)))


@pytest.mark.parametrize(
    "values", [EIGHT_BITS, EIGHT_BITS // 9, EIGHT_BITS * 0, EIGHT_BITS * 0 + 255], ids=str
)
@pytest.mark.parametrize("kind", [None, "TIFF"])
def test_greys_of_8_bits_in_32_keep_their_values(values, kind):
    image = int32(values, kind)
    assert image.mode == "I" and not is_changed_by_convert(image)
    for found in (to_rgb(image), image.convert("RGB")):
        assert np.array_equal(np.asarray(found), np.repeat(values[..., None], 3, -1))


def test_greys_of_8_bits_in_32_are_turned_and_their_transparent_one_is_white():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    turned = int32(EIGHT_BITS, "TIFF", exif=exif)
    assert is_changed_by_convert(turned)
    assert np.array_equal(np.asarray(to_rgb(turned))[..., 0], np.rot90(EIGHT_BITS, -1))
    clear = int32(EIGHT_BITS, transparency=8)
    assert is_changed_by_convert(clear)
    assert np.array_equal(np.asarray(to_rgb(clear))[..., 0], np.where(EIGHT_BITS == 8, 255, EIGHT_BITS))


@pytest.mark.parametrize("image", [
    int32([[0, 255, 256]]), int32([[0, 255, 256]], "TIFF"), int32([[3, 512, 65535]]),
    int32(EIGHT_BITS, "PPM"), int32(EIGHT_BITS, "PNG"), int32([[3, 512, 65535]], "PPM"),
], ids=lambda image: f"{image.format} {image.mode}")  # fmt: skip
def test_greys_of_16_bits_in_32_are_scaled(image):
    assert is_changed_by_convert(image)
    assert np.array_equal(np.asarray(to_rgb(image))[..., 0], np.asarray(image).astype(int) >> 8)


@pytest.mark.parametrize("values", [[[-1, 9]], [[-70000, 9]], [[0, 65536]]], ids=str)
def test_greys_that_do_not_fit_16_bits_are_refused(values):
    assert is_changed_by_convert(int32(values))
    with pytest.raises(ValueError, match=f"values from {values[0][0]} to {values[0][1]}; greys may have"):
        to_rgb(int32(values))


@pytest.mark.parametrize("image", [int32(EIGHT_BITS), int32(EIGHT_BITS, "TIFF")], ids=["memory", "file"])
@pytest.mark.parametrize("converts", [True, False])
def test_a_task_sees_greys_of_8_bits_in_32(image, converts):
    (found,) = as_rgb([image], "an image")
    seen = found.convert("RGB") if converts else to_rgb(found)
    assert found is image  # tasks read masks as numbers
    assert np.asarray(seen).max() == 252


def test_a_truncated_file_of_32_bits_is_left_to_to_rgb(monkeypatch):
    data = saved(Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.int32)), "TIFF")
    assert is_changed_by_convert(Image.open(io.BytesIO(data[:9000])))
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is on"):
        as_rgb(Image.open(io.BytesIO(data[:9000])), "an image")


def test_a_transparent_grey_of_16_bits_is_white():
    grey = Image.fromarray(np.array([[0, 256, 257, 65535]], np.uint16))
    grey.info["transparency"] = 256
    assert np.asarray(to_rgb(grey))[0, :, 0].tolist() == [0, 255, 1, 255]


@pytest.mark.parametrize("value", [np.zeros((4, 4, 3), np.uint8), "a.png", None])
def test_what_is_no_image_is_refused(value):
    with pytest.raises(ValueError, match=f"the image is a {type(value).__name__}; it must be a PIL"):
        to_rgb(value)


def test_a_file_that_is_not_read_yet_is_not_completed(path_of_truncated, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is on"):
        to_rgb(Image.open(path_of_truncated))
    assert to_rgb(RGB).tobytes() == RGB.tobytes()  # in memory, it is complete


@pytest.fixture
def path_of_truncated(tmp_path):
    (tmp_path / "image").write_bytes(REFUSED["truncated jpeg"][0])
    return tmp_path / "image"
