"""Pictures from addresses: which are fetched, how much of them, for how long, and how much is opened."""

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
from served import asked, encoded, scene

from llava_pitome import MergeConfig, load
from llava_pitome.integrations.serve import remote
from llava_pitome.integrations.serve.images import fetched, opened
from llava_pitome.integrations.serve.limits import Limits
from llava_pitome.integrations.serve.prompts import Prompts
from llava_pitome.integrations.serve.request import Refused


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
     "224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "192.0.0.192", "192.88.99.1", "168.63.129.16", "3fff::1", "2002:7f00:1::", "64:ff9b::a00:1",
     "fec0::1", "::7f00:1"],
)  # fmt: skip
def test_private_addresses_are_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f::1"])
def test_public_addresses_are(address):
    assert remote.is_public(address)


class Pictures(BaseHTTPRequestHandler):
    """/a.png is a picture, /far points there, /round to itself, /long is long, /drip comes byte by byte."""

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in ("/far", "/round", "/out"):
            self.send_response(302)
            to = {"/far": "/a.png?x=1", "/round": "/round", "/out": "file:///etc/passwd"}[path]
            self.send_header("Location", to)
            self.end_headers()
            return
        self.send_response(200 if path in ("/a.png", "/long", "/drip", "/host") else 404)
        self.end_headers()
        if path == "/host":
            self.wfile.write(self.headers["Host"].encode())
            return
        body = base64.b64decode(encoded(scene(0)).split(",")[1])
        try:
            if path == "/drip":
                while not self.server.done.wait(0.05):
                    self.wfile.write(b"0")
            self.wfile.write(body * (100 if path == "/long" else 1))
        except OSError:
            return  # the client has had enough

    def log_message(self, *_):
        """Says nothing."""


@contextmanager
def served(wrap=None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
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
def web():
    with served() as at:
        yield at


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """Where https is spoken, with a certificate that nobody has to trust, and the file of who signed it."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    signed = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(signed))
    with served(partial(context.wrap_socket, server_side=True)) as at:
        yield at, signed


def anywhere(url: str, most: int, seconds: float) -> bytes:
    return remote.fetch(url, most, seconds, allowed=lambda address: True)


def soon(limits: Limits) -> float:
    return time.monotonic() + limits.seconds


def had(messages, **limits):
    limits = Limits(urls=True, **limits)
    return opened(messages, limits, fetched(messages, limits, soon(limits), anywhere))


@pytest.mark.parametrize("path", ["/a.png", "/far"])
def test_pictures_are_fetched_where_that_is_on(web, path):
    (message,) = had(asked("x", web + path))
    assert message["content"][0]["image"].tobytes() == scene(0).tobytes()


def test_pictures_are_fetched_over_https_from_whom_somebody_trusted_has_signed(secure, monkeypatch):
    at, signed = secure
    with pytest.raises(Refused, match="certificate"):
        had(asked("x", f"{at}/a.png"))
    monkeypatch.setenv("SSL_CERT_FILE", str(signed))
    (message,) = had(asked("x", f"{at}/a.png"))
    assert message["content"][0]["image"].tobytes() == scene(0).tobytes()


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/none", "answered 404"),
        ("/round", "3 redirects"),
        ("/long", "more than 100000"),
        ("/out", "no http"),
    ],
)
def test_what_cannot_be_fetched_is_refused(web, path, reason):
    with pytest.raises(Refused, match=reason):
        had(asked("x", web + path), picture=100_000)


def test_what_comes_byte_by_byte_is_given_up(web):
    with pytest.raises(Refused, match="cannot be fetched"):
        had(asked("x", f"{web}/drip"), seconds=1)


def test_a_port_that_goes_without_saying_is_not_said(web, secure, monkeypatch):
    at, signed = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(signed))
    for address in (web, at):
        parts = urlsplit(f"{address}/host")
        assert anywhere(parts.geturl(), 100, 30) == parts.netloc.encode()
        monkeypatch.setitem(remote.PORTS, parts.scheme, parts.port)
        assert anywhere(f"{parts.scheme}://127.0.0.1/host", 100, 30) == b"127.0.0.1"


def test_what_comes_byte_by_byte_over_https_is_given_up(secure, monkeypatch):
    at, signed = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(signed))
    with pytest.raises(Refused, match="cannot be fetched"):
        had(asked("x", f"{at}/drip"), seconds=1)


def test_who_accepts_and_says_nothing_over_https_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Refused, match="cannot be fetched"):
        had(asked("x", f"https://127.0.0.1:{silent.getsockname()[1]}/"), seconds=1)


def test_an_address_is_fetched_once_and_all_of_them_share_the_limits_of_one_request():
    read = []

    def reads(url, most, seconds):
        read.append((url, most))
        return b"0" * 600

    messages = asked("x", "http://a/1", "http://a/1", "http://a/2")
    limits = Limits(urls=True, body=1000, picture=700)
    fetched(messages, limits, soon(limits), reads)
    assert read == [("http://a/1", 700), ("http://a/2", 400)]


def test_a_name_that_nobody_resolves_in_time_is_given_up_and_others_are_answered(monkeypatch):
    done = threading.Event()

    def resolves(*_, **__):
        done.wait(30)
        raise OSError("nobody knows")

    monkeypatch.setattr(remote.socket, "getaddrinfo", resolves)
    _, processor = load("embedded", MergeConfig(ratio=0.9))
    prompts = Prompts(processor, 65, Limits(urls=True, seconds=2))

    async def both():
        slow = asyncio.create_task(prompts.inputs(asked("x", "http://example.org/a.png")))
        await asyncio.sleep(0.1)
        found = await prompts.inputs(asked("x", encoded(scene(0))))
        assert not slow.done()
        with pytest.raises(Refused, match="more than 2 s"):
            await slow
        return found

    try:
        assert asyncio.run(both())["pixel_values"].shape[0] == 1
    finally:
        done.set()


def test_a_prompt_that_is_too_long_costs_no_fetching_and_no_opening():
    def reads(*_):
        raise AssertionError("fetched")

    _, processor = load("embedded", MergeConfig(ratio=0.9))
    prompts = Prompts(processor, 65, Limits(urls=True, prompt=64), reads)
    with pytest.raises(Refused, match="at most 64"):
        asyncio.run(prompts.inputs(asked("x", "http://example.org/a.png")))


@pytest.mark.parametrize(
    "url, reason",
    [("ftp://example.org/a", "no http"), ("file:///etc/passwd", "no http"), ("http://", "no http"),
     ("a.png", "no http"), ("http://u:p@h/", "user's name"), ("http://example.org:99999/", "Port")],
)  # fmt: skip
def test_other_addresses_are_no_pictures(url, reason):
    with pytest.raises(Refused, match=reason):
        fetched(asked("x", url), Limits(urls=True), soon(Limits()))


def test_private_addresses_are_never_fetched(web):
    for at in (web, web.replace("127.0.0.1", "localhost")):
        with pytest.raises(Refused, match="not public"):
            fetched(asked("x", f"{at}/a.png"), Limits(urls=True), soon(Limits()))


def test_who_finds_no_thread_to_fetch_with_is_told_that_it_is_the_servers_fault(monkeypatch):
    done = threading.Event()

    def waits(*_):
        done.wait(30)
        return b""

    monkeypatch.setattr("llava_pitome.integrations.serve.prompts.FETCHING", 1)
    _, processor = load("embedded", MergeConfig(ratio=0.9))
    prompts = Prompts(processor, 65, Limits(urls=True, seconds=1), waits)

    async def both():
        asking = [prompts.inputs(asked("x", f"http://example.org/{i}")) for i in range(2)]
        return await asyncio.gather(*asking, return_exceptions=True)

    try:
        assert sorted(refusal.status for refusal in asyncio.run(both())) == [400, 503]
    finally:
        done.set()


def test_base64_may_have_line_breaks():
    head, _, data = encoded(scene(0)).partition(",")
    broken = f"{head}," + "\n".join(data[i : i + 76] for i in range(0, len(data), 76))
    (message,) = had(asked("x", broken))
    assert message["content"][0]["image"].tobytes() == scene(0).tobytes()
