"""Images from URLs: which are fetched, how much of them, for how long, and how they are opened."""

import asyncio
import base64
import socket
import ssl
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import trustme
from serving import data_url, messages, scene
from starlette.exceptions import HTTPException

from llava_pitome import MergeConfig, load
from llava_pitome.integrations.serve import remote
from llava_pitome.integrations.serve.images import fetch_images, open_images
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.requests import Message

PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
    "224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "192.0.0.192",
    "192.88.99.1", "168.63.129.16", "3fff::1", "2002:7f00:1::", "64:ff9b::a00:1", "fec0::1", "::7f00:1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f::1"])
def test_public_addresses_are_public(address):
    assert remote.is_public(address)


REDIRECTS = {"/far": "/a.png?x=1", "/loop": "/loop", "/out": "file:///etc/passwd"}


class Handler(BaseHTTPRequestHandler):
    """/a.png is an image, /far redirects to it, /loop to itself, /long is long, /drip comes byte by byte."""

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[path])
            self.end_headers()
            return
        self.send_response(200 if path in ("/a.png", "/long", "/drip", "/host") else 404)
        self.end_headers()
        if path == "/host":
            self.wfile.write(self.headers["Host"].encode())
            return
        body = base64.b64decode(data_url(scene(0)).split(",")[1])
        try:
            while path == "/drip" and not self.server.done.wait(0.05):
                self.wfile.write(b"0")
            self.wfile.write(body * (100 if path == "/long" else 1))
        except OSError:
            return  # the client has disconnected

    def log_message(self, *_):
        """Logs nothing."""


@contextmanager
def web_server(wrap=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.done = threading.Event()
    if wrap is not None:
        server.socket = wrap(server.socket)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{'https' if wrap else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.done.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def http():
    with web_server() as url:
        yield url


@pytest.fixture(scope="module")
def https(tmp_path_factory):
    """An HTTPS server, and the file of the authority that signed its certificate."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    with web_server(partial(context.wrap_socket, server_side=True)) as url:
        yield url, str(file)


@pytest.fixture
def urls(http, https, monkeypatch):
    """Base URLs of servers whose certificate is trusted."""
    url, file = https
    monkeypatch.setenv("SSL_CERT_FILE", file)
    return [http, url]


def fetch_local(url: str, max_bytes: int, seconds: float) -> bytes:
    return remote.fetch(url, max_bytes, seconds, is_allowed=lambda address: True)


def images(*urls, fetch=fetch_local, **limits):
    limits = Limits(fetch_urls=True, **limits)
    files = fetch_images(list(urls), limits, time.monotonic() + limits.seconds, fetch)
    return open_images(list(urls), files, limits)


@pytest.mark.parametrize("path", ["/a.png", "/far"])
def test_images_are_fetched_over_http_and_https(urls, path):
    for url in urls:
        (image,) = images(url + path)
        assert image.tobytes() == scene(0).tobytes()


def test_certificates_are_verified(https):
    with pytest.raises(HTTPException, match="certificate"):
        images(f"{https[0]}/a.png")


REFUSED = {
    "/none": "answered 404",
    "/loop": "3 redirects",
    "/long": "more than 100000",
    "/out": "not an http",
}


@pytest.mark.parametrize("path", REFUSED)
def test_other_answers_than_an_image_are_refused(http, path):
    with pytest.raises(HTTPException, match=REFUSED[path]):
        images(http + path, image_bytes=100_000)


def test_an_answer_that_comes_byte_by_byte_is_given_up(urls):
    for url in urls:
        with pytest.raises(HTTPException, match="cannot be fetched"):
            images(f"{url}/drip", seconds=1)


def test_a_tls_server_that_never_answers_is_given_up():
    refused = pytest.raises(HTTPException, match="cannot be fetched")
    with socket.create_server(("127.0.0.1", 0)) as silent, refused:
        images(f"https://127.0.0.1:{silent.getsockname()[1]}/", seconds=1)


def test_the_host_header_leaves_default_ports_out(urls, monkeypatch):
    for url in urls:
        parts = urlsplit(f"{url}/host")
        assert fetch_local(parts.geturl(), 100, 30) == parts.netloc.encode()
        monkeypatch.setitem(remote.PORTS, parts.scheme, parts.port)
        assert fetch_local(f"{parts.scheme}://127.0.0.1/host", 100, 30) == b"127.0.0.1"


def test_a_url_is_fetched_once_and_all_share_the_limit_of_a_request():
    fetched = []

    def record(url, most, _):
        fetched.append((url, most))
        return b"0" * 600

    limits = Limits(fetch_urls=True, request_bytes=1000, image_bytes=700)
    fetch_images(["http://a/1", "http://a/1", "http://a/2"], limits, time.monotonic() + 30, record)
    assert fetched == [("http://a/1", 700), ("http://a/2", 400)]


OTHER = {
    "ftp://example.org/a": "not an http", "file:///etc/passwd": "not an http", "http://": "not an http",
    "a.png": "not an http", "http://u:p@h/": "user name", "http://example.org:99999/": "Port",
}  # fmt: skip


@pytest.mark.parametrize("url", OTHER)
def test_other_urls_are_refused(url):
    with pytest.raises(HTTPException, match=OTHER[url]):
        images(url)


def test_private_urls_are_never_fetched(http):
    for url in (http, http.replace("127.0.0.1", "localhost")):
        with pytest.raises(HTTPException, match="not public"):
            images(f"{url}/a.png", fetch=remote.fetch)


def test_base64_may_have_line_breaks():
    header, _, data = data_url(scene(0)).partition(",")
    broken = f"{header}," + "\n".join(data[i : i + 76] for i in range(0, len(data), 76))
    assert images(broken)[0].tobytes() == scene(0).tobytes()


def prompts(fetch=remote.fetch, **limits):
    from llava_pitome.integrations.serve.generation import Prompts

    _, processor = load("embedded", MergeConfig(ratio=0.9))
    return Prompts(processor, 65, Limits(fetch_urls=True, **limits), fetch)


def chat(url):
    return [Message.model_validate(message) for message in messages("x", url)]


@pytest.fixture
def forever():
    """Blocks the thread that calls it until the test is over."""
    done = threading.Event()

    def block(*_, **__):
        done.wait(30)
        raise OSError("not found")

    yield block
    done.set()


def test_slow_dns_is_given_up_and_others_are_answered(monkeypatch, forever):
    monkeypatch.setattr(remote.socket, "getaddrinfo", forever)
    prepare = prompts(seconds=2)

    async def both():
        slow = asyncio.create_task(prepare.inputs(chat("http://example.org/a.png")))
        await asyncio.sleep(0.1)
        inputs = await prepare.inputs(chat(data_url(scene(0))))
        assert not slow.done()
        with pytest.raises(HTTPException, match="more than 2 s"):
            await slow
        return inputs

    assert asyncio.run(both())["pixel_values"].shape[0] == 1


def test_a_request_without_a_free_thread_to_fetch_gets_a_503(monkeypatch, forever):
    monkeypatch.setattr("llava_pitome.integrations.serve.generation.FETCH_THREADS", 1)
    prepare = prompts(forever, seconds=1)

    async def both():
        requests = [prepare.inputs(chat(f"http://example.org/{i}")) for i in range(2)]
        return await asyncio.gather(*requests, return_exceptions=True)

    assert sorted(error.status_code for error in asyncio.run(both())) == [400, 503]


def test_a_prompt_that_is_too_long_is_refused_before_its_images_are_fetched():
    def fail(*_):
        raise AssertionError("fetched")

    with pytest.raises(HTTPException, match="at most 64"):
        asyncio.run(prompts(fail, prompt_tokens=64).inputs(chat("http://example.org/a.png")))
