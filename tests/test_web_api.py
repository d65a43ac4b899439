"""The web page's HTTP API: programs get answers, and what is wrong with a request is said in words."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from PIL import Image

from llava_pitome import MergeConfig, load
from llava_pitome.cli.main import main
from llava_pitome.cli.web import examples
from llava_pitome.cli.web.checked import Checked
from llava_pitome.cli.web.desk import Desk
from llava_pitome.cli.web.files import folder, interrupted
from llava_pitome.cli.web.launching import launch
from llava_pitome.cli.web.page import build
from llava_pitome.cli.web.start import Start
from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.integrations.serve.listening import listening

META = {"_type": "gradio.FileData"}
COUNT = "How many objects are there?"
CHOICES = ("pitome", 0.9, False)
NOTE = "This model was saved to merge otherwise."


def png(width, height, pixels=b""):
    """A PNG file of greys whose head says how large it is, whatever pixels follow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def scene_png():
    held = io.BytesIO()
    Image.fromarray(render(scene(8))).save(held, "PNG")
    return held.getvalue()


class Client:
    """A program that speaks to the page."""

    def __init__(self, address):
        self.http = httpx.Client(base_url=f"{address.rstrip('/')}/gradio_api/", timeout=60)

    def upload(self, data, name="picture.png"):
        reply = self.http.post("upload", files={"files": (name, data)})
        assert reply.status_code == 200, reply.text
        return {"path": reply.json()[0], "meta": META}

    def call(self, name, *values):
        """How a call ends: "complete" or "error", and what with."""
        body, kind = json.dumps({"data": values}), {"content-type": "application/json"}
        asked = self.http.post(f"call/{name}", content=body, headers=kind)
        assert asked.status_code == 200, asked.text
        told = self.http.get(f"call/{name}/{asked.json()['event_id']}").text
        end, data = told.strip().split("\n\n")[-1].split("\n")
        return end.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def join(self, function, *values):
        """The same by the way that browsers take."""
        asked = {"data": list(values), "fn_index": function, "session_hash": "programs"}
        event = self.http.post("queue/join", json=asked).json()["event_id"]
        with self.http.stream("GET", "queue/data", params={"session_hash": "programs"}) as told:
            for line in told.iter_lines():
                found = json.loads(line.removeprefix("data: ")) if line else {}
                if found.get("msg") == "process_completed" and found["event_id"] == event:
                    return found

    def answers(self):
        """Whether the page still does."""
        end, found = self.call("ask", None, "What is this?", *CHOICES)
        return end == "complete" and "0 image tokens of 0" in found[1]


@pytest.fixture(scope="module")
def fetched():
    """Addresses that Gradio fetched."""
    return []


@pytest.fixture(scope="module")
def page(fetched):
    async def fetch(url, *_):
        fetched.append(url)
        raise RuntimeError("fetched")

    with pytest.MonkeyPatch.context() as patch, folder() as files:
        for name in ("async_ssrf_protected_download", "async_ssrf_protected_get"):
            patch.setattr(f"gradio.processing_utils.{name}", fetch)
        yield build(Desk(*load("embedded"), 16), examples.write(files), Start(ratio=0.6, note=NOTE))


@pytest.fixture(scope="module")
def client(page):
    with listening("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    yield Client(launch(page, "127.0.0.1", port, 1, wait=False))
    page.close()


def props(page, name):
    return next(b for b in page.blocks.values() if getattr(b, "elem_id", None) == name)


def test_a_program_uploads_asks_and_looks(client):
    end, found = client.call("ask", client.upload(scene_png()), COUNT, *CHOICES)
    assert end == "complete" and found[6]["maximum"] == 11
    assert client.call("look", 3) == ("complete", [None, None, "*Ask something; what merged is shown here.*"])


def test_an_example_may_be_asked_about_by_its_path(client, page):
    path = str(next(Path(page.GRADIO_CACHE).glob("scene-8.png")))
    assert client.call("ask", {"path": path, "meta": META}, COUNT, *CHOICES)[0] == "complete"


BROKEN = {
    "is no picture: b'not a pi'": b"not a picture",
    "is no picture: an empty file": b"",
    "is truncated": scene_png()[:200],
    "too many pixels; allowed are 67,108,864": png(20000, 20000),
    "9000 x 9000 are 81,000,000, allowed are 67,108,864": png(9000, 9000),
    "is no picture": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize(
    "words, data", BROKEN.items(), ids=["text", "nothing", "half", "bomb", "large", "svg"]
)
def test_a_file_that_is_no_whole_picture_is_refused_in_our_words(client, words, data):
    end, found = client.call("ask", client.upload(data), COUNT, *CHOICES)
    assert end == "error" and words in found["error"] and found["error"].startswith("the picture")
    assert client.answers()


def test_a_picture_of_one_pixel_is_answered(client):
    assert client.call("ask", client.upload(png(1, 1, b"\0\0")), COUNT, *CHOICES)[0] == "complete"


ELSEWHERE = "it must be a file that was uploaded to this page; addresses and data: are never read"
FILES = {
    "address": ({"path": "http://127.0.0.1:9/a.png", "meta": META}, ELSEWHERE),
    "stream": ({"path": "https://127.0.0.1:9/a.png", "is_stream": True, "meta": META}, ELSEWHERE),
    "elsewhere": ({"path": "/etc/passwd", "meta": META}, ELSEWHERE),
    "upwards": ({"path": "{folder}/../../etc/passwd", "meta": META}, ELSEWHERE),
    "relative": ({"path": "pyproject.toml", "meta": META}, ELSEWHERE),
    "nul": ({"path": "{folder}/\0", "meta": META}, ELSEWHERE),
    "data": ({"path": "data:image/png;base64,iVBORw0KGgo=", "meta": META}, ELSEWHERE),
    "gone": ({"path": "{folder}/gone.png", "meta": META}, "the picture is no longer here: upload it again"),
    "long": ({"path": "{folder}/" + "a" * 5000, "meta": META}, "the picture is no longer here"),
    "folder": ({"path": "{folder}", "meta": META}, "is no file"),
    "url": ({"path": None, "url": "http://127.0.0.1:9/a.png", "meta": META}, "must be an uploaded file, or"),
    "text": ("http://127.0.0.1:9/a.png", "must be an uploaded file, or null"),
    "number": (5, "must be an uploaded file, or null"),
    "list": ([{"path": "http://127.0.0.1:9/a.png", "meta": META}], "must be an uploaded file, or null"),
}


@pytest.mark.parametrize("picture, words", FILES.values(), ids=FILES)
def test_nothing_but_uploads_is_read_and_nothing_is_fetched(client, page, fetched, picture, words):
    text = json.dumps(picture).replace("{folder}", page.GRADIO_CACHE)
    number = next(i for i, f in page.fns.items() if f.api_name == "ask")
    end, found = client.call("ask", json.loads(text), COUNT, *CHOICES)
    assert end == "error" and words in found["error"]
    joined = client.join(number, json.loads(text), COUNT, *CHOICES)
    assert not joined["success"] and words in joined["output"]["error"]
    assert not fetched and client.answers()


def test_what_else_a_file_says_of_itself_is_not_looked_at(client, fetched):
    said = {"url": "http://127.0.0.1:9/a.png", "size": "large", "orig_name": 5, "is_stream": True}
    assert client.call("ask", client.upload(scene_png()) | said, COUNT, *CHOICES)[0] == "complete"
    said = {"url": "data:image/png;base64,iVBORw0KGgo=", "meta": 5}
    assert client.call("ask", client.upload(scene_png()) | said, COUNT, *CHOICES)[0] == "complete"
    assert not fetched


def test_a_file_on_disk_that_is_too_large_is_refused(client, page):
    path = Path(page.GRADIO_CACHE) / "large.png"
    path.write_bytes(bytes(2**20 + 1))
    end, found = client.call("ask", {"path": str(path), "meta": META}, COUNT, *CHOICES)
    assert end == "error"
    assert found["error"] == "the picture has 1,048,577 bytes; at most 1,048,576 are allowed"


VALUES = {
    "long": ((None, "a" * 2001, *CHOICES), "the question has 2,001 characters; at most 2,000 are allowed"),
    "null": ((None, None, *CHOICES), "question=null is not allowed: it must be text"),
    "number": ((None, 5, *CHOICES), "question=5 is not allowed: it must be text"),
    "half": ((None, "\ud800", *CHOICES), "the question holds half characters"),
    "empty": ((None, " ", *CHOICES), "the question is empty"),
    "file": ((None, {"path": "http://127.0.0.1:9/", "meta": META}, *CHOICES),
             "Question may not be an object or a list"),
    "method": ((None, "a", "nope", 0.9, False), "method='nope' is unknown; allowed are pitome, tome,"),
    "no method": ((None, "a", None, 0.9, False), "method=null is unknown"),
    "ratio": ((None, "a", "pitome", 5, False), "ratio=5 is not allowed: it must be a number in (0, 1]"),
    "vast ratio": ((None, "a", "pitome", 10**400, False), "it must be a number in (0, 1]"),
    "no ratio": ((None, "a", "pitome", None, False), "ratio=null is not allowed"),
    "true ratio": ((None, "a", "pitome", True, False), "ratio=True is not allowed"),
    "text ratio": ((None, "a", "pitome", "0.9", False), "ratio='0.9' is not allowed"),
    "compare": ((None, "a", "pitome", 0.9, "yes"), "compare='yes' is not allowed: it must be true or false"),
    "few": ((None, "a", "pitome"), "3 values are given where 5 are asked for"),
    "many": ((None, "a", *CHOICES, 1), "6 values are given where 5 are asked for"),
}  # fmt: skip


@pytest.mark.parametrize("values, words", VALUES.values(), ids=VALUES)
def test_a_value_that_is_not_allowed_is_named(client, fetched, values, words):
    end, found = client.call("ask", *values)
    assert end == "error" and words in found["error"]
    assert not fetched and client.answers()


@pytest.mark.parametrize("layer", ["1", None, True, -1, 12, 1.5, 10**400], ids=str)
def test_a_layer_that_is_not_there_is_named(client, layer):
    end, found = client.call("look", layer)
    assert end == "error" and "is not allowed: it must be a whole number from 0 to 11" in found["error"]


@pytest.mark.parametrize(
    "path", ["file=http://127.0.0.1:9/a", "file=https%3A%2F%2Fexample.org/a", "proxy=http://a.hf.space/"]
)
def test_addresses_are_not_fetched_for_others(client, fetched, path):
    reply = client.http.get(path)
    assert (reply.status_code, reply.json()) == (403, {"detail": "this page fetches no addresses"})
    assert not fetched


@pytest.mark.parametrize("path", ["process_recording", "component_server", "api/ask", "vibe-edit"])
def test_what_the_page_does_not_need_is_not_there(client, path):
    reply = client.http.post(path, json={})
    assert reply.status_code == 404 and f"this page has no POST /gradio_api/{path}" in reply.json()["detail"]
    assert client.http.get("deep_link", params={"session_hash": "a"}).status_code == 404


def test_a_gradio_that_would_not_ask_the_check_is_refused(monkeypatch):
    monkeypatch.delattr("gradio.Blocks.preprocess_data")
    with pytest.raises(RuntimeError, match="where the page checks files"):
        Checked("a page")


def test_files_of_this_machine_are_not_served(client):
    assert client.http.get("file=/etc/passwd").status_code == 403


def test_a_request_that_is_too_long_or_says_no_length_ends_early(client):
    reply = client.http.post("call/ask", json={"data": [None, "a" * 2**16, *CHOICES]})
    assert reply.status_code == 413 and "at most 65,536 are allowed" in reply.json()["detail"]
    assert client.http.post("call/ask", content=iter([b"{}"])).status_code == 411
    reply = client.http.post("upload", files={"files": ("a.png", bytes(2**20 + 1))})
    assert reply.status_code == 413 and "exceeded maximum allowed size of 1048576 bytes" in reply.text
    assert client.http.post("upload", files={"files": ("a.png", bytes(2**21))}).status_code == 413


def test_what_was_not_used_for_an_hour_is_deleted(client, page, monkeypatch):
    from gradio import route_utils

    old, used = (Path(client.upload(scene_png(), name)["path"]) for name in ("old.png", "used.png"))
    client.call("ask", {"path": str(used), "meta": META}, COUNT, *CHOICES)
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
    assert len(list(Path(page.GRADIO_CACHE).glob("scene-*.png"))) == len(examples.SEEDS)


def test_the_page_starts_as_it_is_told(page):
    assert (props(page, "ratio").minimum, props(page, "ratio").value) == (0.6, 0.6)
    assert props(page, "method").value == "pitome" and props(page, "note").value == NOTE


def test_files_of_pages_are_where_the_user_wants_them_and_gone_afterwards(tmp_path, monkeypatch):
    wanted = tmp_path / "wanted"
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(wanted))
    with folder() as files:
        assert files.parent == wanted and os.environ["GRADIO_TEMP_DIR"] == str(files)
        (files / "left").touch()
    assert os.environ["GRADIO_TEMP_DIR"] == str(wanted) and not list(wanted.iterdir())
    monkeypatch.delenv("GRADIO_TEMP_DIR")
    with pytest.raises(KeyError), folder() as files:
        raise KeyError
    assert "GRADIO_TEMP_DIR" not in os.environ and not files.exists()


def test_signals_end_the_page_cleanly_but_for_those_that_are_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), interrupted():
            os.kill(os.getpid(), signal.SIGHUP)  # as if under nohup
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def command(tmp_path):
    """`llava-pitome web` as a process whose files would lie in tmp_path, and its client."""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    words = [sys.executable, "-m", "llava_pitome", "web", "--port", "0"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "Running on local URL" in line)
        yield process, Client(line.split()[-1])
        process.kill()


def test_the_command_takes_a_free_port_and_leaves_nothing_behind(command, tmp_path):
    process, client = command
    client.upload(scene_png())
    assert client.answers() and list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not list(tmp_path.iterdir())


@pytest.fixture
def made(monkeypatch):
    """Runs the command up to where the page would be served, and gives what stands on it by its id."""
    pages = []
    monkeypatch.setattr("llava_pitome.cli.web.launching.launch", lambda page, *_: pages.append(page))

    def make(*words):
        assert main(["web", "--port", "0", *words]) == 0
        return {getattr(block, "elem_id", None): block for block in pages.pop().blocks.values()}

    return make


def test_the_slider_reaches_down_to_a_low_ratio(made):
    assert (made()["ratio"].minimum, made("--ratio", "0.95")["ratio"].minimum) == (0.7, 0.7)
    low = made("--ratio", "0.5")
    assert (low["ratio"].minimum, low["ratio"].value) == (0.5, 0.5)
    assert low["amount"].value.startswith("1 image tokens of 196")


def save(config, place):
    model, processor = load("embedded", config)
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return str(place)


def test_the_command_starts_as_the_model_was_saved_to_merge(made, tmp_path):
    saved = save(MergeConfig(method="tome", ratio=0.8), tmp_path)
    shown = made("--model", saved)
    assert (shown["method"].value, shown["ratio"].value, "note" in shown) == ("tome", 0.8, False)
    asked = made("--model", saved, "--ratio", "0.95")
    assert (asked["method"].value, asked["ratio"].value, "note" in asked) == ("pitome", 0.95, False)


def test_a_saved_merging_that_the_page_cannot_show_is_said_on_it(made, tmp_path):
    shown = made("--model", save(MergeConfig(ratio=0.9, prefix=20), tmp_path))
    assert (shown["method"].value, shown["ratio"].value) == ("pitome", 0.9)
    assert '"prefix": 20' in shown["note"].value
    assert "the page starts with pitome at a ratio of 0.9" in shown["note"].value
