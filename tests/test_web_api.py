"""The HTTP API of the web page: programs get answers, and reasons for what is refused."""

import io
import json
import os
import signal
import struct
import zlib
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving import run_until_signal

from llava_pitome import MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.cli.web.command import interrupt_on_signals, temporary_folder
from llava_pitome.cli.web.session import InitialChoices, Session
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.integrations.serve.command import listen

META = {"_type": "gradio.FileData"}
COUNT = "How many objects are there?"
CHOICES = ("pitome", 0.9, False)
NOTE = "This model was saved to merge otherwise."
URL = "http://127.0.0.1:9/a.png"


def png(width, height, pixels=b""):
    """A grey PNG file of a size in its header, whatever pixels follow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def scene_png():
    file = io.BytesIO()
    Image.fromarray(render(scene(8))).save(file, "PNG")
    return file.getvalue()


class Client:
    """A program that calls the API."""

    def __init__(self, url):
        self.http = httpx.Client(base_url=f"{url.rstrip('/')}/gradio_api/", timeout=60)

    def upload(self, data, name="image.png"):
        response = self.http.post("upload", files={"files": (name, data)})
        assert response.status_code == 200, response.text
        return {"path": response.json()[0], "meta": META}

    def call(self, name, *values):
        """How a call ends, "complete" or "error", and its data."""
        body, kind = json.dumps({"data": values}), {"content-type": "application/json"}
        response = self.http.post(f"call/{name}", content=body, headers=kind)
        assert response.status_code == 200, response.text
        events = self.http.get(f"call/{name}/{response.json()['event_id']}").text
        event, data = events.strip().split("\n\n")[-1].split("\n")
        return event.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def ask(self, image, question=COUNT, choices=CHOICES):
        return self.call("ask", image, question, *choices)

    def join(self, function, *values):
        """The same over the endpoints that browsers use."""
        call = {"data": list(values), "fn_index": function, "session_hash": "programs"}
        event = self.http.post("queue/join", json=call).json()["event_id"]
        with self.http.stream("GET", "queue/data", params={"session_hash": "programs"}) as response:
            for line in response.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed" and message["event_id"] == event:
                    return message

    def is_answered(self):
        event, data = self.ask(None, "What is this?")
        return event == "complete" and "0 image tokens of 0" in data[1]


@pytest.fixture(scope="module")
def fetched():
    """URLs that Gradio fetched."""
    return []


@pytest.fixture(scope="module")
def web_page():
    """The module of the page, which imports Gradio."""
    from llava_pitome.cli.web import page

    return page


@pytest.fixture(scope="module")
def page(fetched, web_page):
    async def fetch(url, *_):
        fetched.append(url)
        raise RuntimeError("fetched")

    with pytest.MonkeyPatch.context() as patch, temporary_folder() as folder:
        for name in ("async_ssrf_protected_download", "async_ssrf_protected_get"):
            patch.setattr(f"gradio.processing_utils.{name}", fetch)
        session, initial = Session(*load("embedded"), 16), InitialChoices(ratio=0.6, note=NOTE)
        yield web_page.build(session, web_page.write_examples(folder), initial)


@pytest.fixture(scope="module")
def client(page, web_page):
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    yield Client(web_page.launch(page, "127.0.0.1", port, 1, wait=False))
    page.close()


def blocks(page):
    return {getattr(block, "elem_id", None): block for block in page.blocks.values()}


def test_an_upload_is_answered_and_studied(client, web_page):
    event, data = client.ask(client.upload(scene_png()))
    assert event == "complete" and data[6]["maximum"] == 11
    assert client.call("look", 3) == ("complete", [None, None, web_page.EMPTY])


def test_an_example_is_answered_by_its_path(client, page):
    path = str(next(Path(page.GRADIO_CACHE).glob("scene-8.png")))
    assert client.ask({"path": path, "meta": META})[0] == "complete"


def test_an_image_of_one_pixel_is_answered(client):
    assert client.ask(client.upload(png(1, 1, b"\0\0")))[0] == "complete"


BROKEN = {
    "text": (b"not an image", "b'not an i'"),
    "empty": (b"", "an empty file"),
    "truncated": (scene_png()[:200], "is truncated"),
    "bomb": (png(20000, 20000), "too many pixels; allowed are 67,108,864"),
    "large": (png(9000, 9000), "9000 x 9000 are 81,000,000, allowed are 67,108,864"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "b'<svg xml'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_refused_with_the_reason(client, name):
    data, reason = BROKEN[name]
    event, result = client.ask(client.upload(data))
    assert event == "error" and reason in result["error"]
    assert client.is_answered()


ELSEWHERE = "it must be a file that was uploaded to this page; URLs and data: are never read"
NO_FILE = "must be an uploaded file, or null"
FILES = {
    "url": ({"path": URL, "meta": META}, ELSEWHERE),
    "stream": ({"path": URL.replace("http", "https"), "is_stream": True, "meta": META}, ELSEWHERE),
    "elsewhere": ({"path": "/etc/passwd", "meta": META}, ELSEWHERE),
    "upwards": ({"path": "{folder}/../../etc/passwd", "meta": META}, ELSEWHERE),
    "relative": ({"path": "pyproject.toml", "meta": META}, ELSEWHERE),
    "nul": ({"path": "{folder}/\0", "meta": META}, ELSEWHERE),
    "data": ({"path": "data:image/png;base64,iVBORw0KGgo=", "meta": META}, ELSEWHERE),
    "deleted": (
        {"path": "{folder}/deleted.png", "meta": META},
        "the image no longer exists: upload it again",
    ),
    "long": ({"path": "{folder}/" + "a" * 5000, "meta": META}, "the image no longer exists"),
    "folder": ({"path": "{folder}", "meta": META}, "is not a file"),
    "no path": ({"path": None, "url": URL, "meta": META}, NO_FILE),
    "text": (URL, NO_FILE),
    "number": (5, NO_FILE),
    "list": ([{"path": URL, "meta": META}], NO_FILE),
}


@pytest.mark.parametrize("name", FILES)
def test_only_uploads_are_read_and_nothing_is_fetched(client, page, fetched, name):
    image, reason = FILES[name]
    image = json.loads(json.dumps(image).replace("{folder}", page.GRADIO_CACHE))
    number = next(i for i, f in page.fns.items() if f.api_name == "ask")
    event, data = client.ask(image)
    assert event == "error" and reason in data["error"]
    joined = client.join(number, image, COUNT, *CHOICES)
    assert not joined["success"] and reason in joined["output"]["error"]
    assert not fetched and client.is_answered()


OTHER_FIELDS = [
    {"url": URL, "size": "large", "orig_name": 5, "is_stream": True},
    {"url": "data:image/png;base64,iVBORw0KGgo=", "meta": 5},
]


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=["url", "data"])
def test_other_fields_of_a_file_are_ignored(client, fetched, fields):
    assert client.ask(client.upload(scene_png()) | fields)[0] == "complete"
    assert not fetched


def test_a_large_file_on_disk_is_refused(client, page):
    path = Path(page.GRADIO_CACHE) / "large.png"
    path.write_bytes(bytes(2**20 + 1))
    event, data = client.ask({"path": str(path), "meta": META})
    assert event == "error"
    assert data["error"] == "the image has 1,048,577 bytes; at most 1,048,576 are allowed"


VALUES = {
    "long": ((None, "a" * 2001, *CHOICES), "is not allowed: it should have at most 2000 characters"),
    "null": ((None, None, *CHOICES), "question=None is not allowed: it should be a valid string"),
    "number": ((None, 5, *CHOICES), "question=5 is not allowed"),
    "surrogate": (
        (None, "\ud800", *CHOICES),
        r"question='\ud800' is not allowed: it should be a valid string",
    ),
    "empty": ((None, " ", *CHOICES), "the question is empty"),
    "file": ((None, {"path": URL, "meta": META}, *CHOICES), "Question may not be an object or a list"),
    "method": (
        (None, "a", "nope", 0.9, False),
        "method='nope' is not allowed: it should be one of pitome, tome,",
    ),
    "no method": ((None, "a", None, 0.9, False), "method=None is not allowed"),
    "ratio": (
        (None, "a", "pitome", 5, False),
        "ratio=5 is not allowed: it should be less than or equal to 1",
    ),
    "zero ratio": ((None, "a", "pitome", 0, False), "ratio=0 is not allowed: it should be greater than 0"),
    "vast ratio": ((None, "a", "pitome", 10**400, False), "ratio=1000000"),
    "no ratio": ((None, "a", "pitome", None, False), "ratio=None is not allowed"),
    "true ratio": ((None, "a", "pitome", True, False), "ratio=True is not allowed"),
    "text ratio": ((None, "a", "pitome", "0.9", False), "ratio='0.9' is not allowed"),
    "compare": (
        (None, "a", "pitome", 0.9, "yes"),
        "compare='yes' is not allowed: it should be a valid boolean",
    ),
    "few": ((None, "a", "pitome"), "3 values are given; 5 are needed"),
    "many": ((None, "a", *CHOICES, 1), "6 values are given; 5 are needed"),
}


@pytest.mark.parametrize("name", VALUES)
def test_an_invalid_value_is_named(client, fetched, name):
    values, reason = VALUES[name]
    event, data = client.call("ask", *values)
    assert event == "error" and reason in data["error"]
    assert not fetched and client.is_answered()


@pytest.mark.parametrize("layer", ["1", None, True, -1, 12, 1.5, 10**400], ids=str)
def test_an_invalid_layer_is_named(client, layer):
    event, data = client.call("look", layer)
    assert event == "error" and "is not allowed: it must be a whole number from 0 to 11" in data["error"]


@pytest.mark.parametrize(
    "path", ["file=http://127.0.0.1:9/a", "file=https%3A%2F%2Fexample.org/a", "proxy=http://a.hf.space/"]
)
def test_urls_are_not_fetched_for_clients(client, fetched, path):
    response = client.http.get(path)
    assert (response.status_code, response.json()) == (403, {"detail": "this page fetches no URLs"})
    assert not fetched


@pytest.mark.parametrize("path", ["process_recording", "component_server", "api/ask", "vibe-edit"])
def test_unused_endpoints_of_gradio_are_refused(client, path):
    response = client.http.post(path, json={})
    assert response.status_code == 404 and f"no POST /gradio_api/{path}" in response.json()["detail"]
    assert client.http.get("deep_link", params={"session_hash": "a"}).status_code == 404


def test_a_gradio_without_the_checked_method_is_refused(monkeypatch):
    from llava_pitome.cli.web.uploads import CheckedBlocks

    monkeypatch.delattr("gradio.Blocks.preprocess_data")
    with pytest.raises(RuntimeError, match="where the page checks files"):
        CheckedBlocks("a page")


def test_files_of_this_machine_are_not_served(client):
    assert client.http.get("file=/etc/passwd").status_code == 403


def test_long_requests_and_those_without_a_length_are_refused(client):
    response = client.http.post("call/ask", json={"data": [None, "a" * 2**16, *CHOICES]})
    assert response.status_code == 413 and "at most 65,536 are allowed" in response.json()["detail"]
    assert client.http.post("call/ask", content=iter([b"{}"])).status_code == 411
    response = client.http.post("upload", files={"files": ("a.png", bytes(2**20 + 1))})
    assert response.status_code == 413 and "exceeded maximum allowed size of 1048576 bytes" in response.text
    assert client.http.post("upload", files={"files": ("a.png", bytes(2**21))}).status_code == 413


def test_files_that_were_not_used_for_an_hour_are_deleted(client, page, web_page, monkeypatch):
    from gradio import route_utils

    old, used = (Path(client.upload(scene_png(), name)["path"]) for name in ("old.png", "used.png"))
    client.ask({"path": str(used), "meta": META})
    frequency, age = page.delete_cache
    assert frequency < age == 3600
    middle = (old.stat().st_ctime + used.stat().st_ctime) / 2

    class Later(datetime):
        @classmethod
        def now(cls):
            return cls.fromtimestamp(middle + age)

    monkeypatch.setattr(route_utils, "datetime", Later)
    route_utils.delete_files_created_by_app(page, age)
    assert used.exists() and not old.exists()
    assert len(list(Path(page.GRADIO_CACHE).glob("scene-*.png"))) == len(web_page.EXAMPLES)


def test_the_page_starts_with_the_initial_choices(page):
    shown = blocks(page)
    assert (shown["ratio"].minimum, shown["ratio"].value) == (0.6, 0.6)
    assert shown["method"].value == "pitome" and shown["note"].value == NOTE


def test_the_parameters_of_the_api_are_stable(page):
    endpoints = page.get_api_info()["named_endpoints"]
    names = {path: [p["parameter_name"] for p in info["parameters"]] for path, info in endpoints.items()}
    assert names == {"/ask": ["picture", "question", "method", "ratio", "compare"], "/look": ["layer"]}


def test_the_temporary_folder_is_deleted(tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(parent))
    with temporary_folder() as folder:
        assert folder.parent == parent and os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "file").touch()
    assert os.environ["GRADIO_TEMP_DIR"] == str(parent) and not list(parent.iterdir())
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with pytest.raises(KeyError), temporary_folder() as folder:
        raise KeyError
    assert "GRADIO_TEMP_DIR" not in os.environ and not folder.exists()


def test_signals_interrupt_unless_they_are_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_answers_until_it_is_terminated_and_deletes_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    results = []

    def ask(line):
        client = Client(line.split()[-1])
        client.upload(scene_png())
        results.append(client.is_answered() and list(tmp_path.iterdir()))

    words = ["web", "--port", "0"]
    assert run_until_signal(monkeypatch, words, "Running on local URL", ask, signal.SIGTERM) == 0
    assert results[0] and not list(tmp_path.iterdir())


@pytest.fixture
def shown(web_page, monkeypatch):
    """Runs the command up to the launch of the page and returns its blocks by their ids."""
    pages = []
    monkeypatch.setattr(web_page, "launch", lambda page, *_: pages.append(page))

    def run(*words):
        assert main(["web", "--port", "0", *words]) == 0
        return blocks(pages.pop())

    return run


def save(config, folder):
    model, processor = load("embedded", config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_slider_reaches_down_to_a_low_ratio(shown):
    assert (shown()["ratio"].minimum, shown("--ratio", "0.95")["ratio"].minimum) == (0.7, 0.7)
    low = shown("--ratio", "0.5")
    assert (low["ratio"].minimum, low["ratio"].value) == (0.5, 0.5)
    assert low["amount"].value.startswith("1 image tokens of 196")


def test_the_command_starts_with_the_saved_config(shown, tmp_path):
    model = save(MergeConfig(method="tome", ratio=0.8), tmp_path)
    saved = shown("--model", model)
    assert (saved["method"].value, saved["ratio"].value, "note" in saved) == ("tome", 0.8, False)
    other = shown("--model", model, "--ratio", "0.95")
    assert (other["method"].value, other["ratio"].value, "note" in other) == ("pitome", 0.95, False)


def test_the_command_notes_a_saved_config_that_the_page_cannot_express(shown, tmp_path):
    page = shown("--model", save(MergeConfig(ratio=0.9, prefix=20), tmp_path))
    assert (page["method"].value, page["ratio"].value) == ("pitome", 0.9)
    assert '"prefix": 20' in page["note"].value
    assert "the page starts with pitome at a ratio of 0.9" in page["note"].value


def test_the_command_starts_with_an_adapter_whose_config_is_given(shown, tmp_path):
    """One that does not say how it merged; without a ratio it is refused."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load("embedded")[0], LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
    model.save_pretrained(tmp_path)
    assert shown("--model", str(tmp_path), "--ratio", "0.8")["ratio"].value == 0.8
