"""The measurement of servers, against a small one in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval import throughput


class Server(ThreadingHTTPServer):
    """Answers every request at once, and records it."""

    def __init__(self, tokens, fails=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.fails, self.bodies, self.lock = tokens, fails, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {"data": [{"id": "small"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
        usage = {"prompt_tokens": self.server.tokens, "completion_tokens": body["max_tokens"]}
        self.reply(400 if self.server.fails else 200, {"usage": usage, "error": "no room"})

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    started = []

    def start(*args, **options):
        started.append(Server(*args, **options))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def run(tmp_path, servers, *words):
    small = ["requests=5", "rounds=2", "concurrency=1,3", "warmup=1", "side=16", f"output={tmp_path}"]
    return throughput.main([f"servers={servers}", *small, *words])


def test_every_server_gets_as_many_requests_and_no_image_twice(serve, tmp_path, capsys):
    plain, merged = serve(200), serve(60)
    assert run(tmp_path, f"plain={plain.url},merged={merged.url}/v1/", 'body={"ignore_eos": true}') == 0
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert [(row["server"], row["concurrency"]) for row in rows] == [
        ("plain", 1), ("merged", 1), ("plain", 3), ("merged", 3)
    ]  # fmt: skip
    assert {row["server"]: row["prompt_tokens"] for row in rows} == {"plain": 200, "merged": 60}
    assert all(len(row["rates"]) == 2 and row["requests_per_second"] > 0 for row in rows)
    bodies = plain.bodies + merged.bodies
    assert len(plain.bodies) == len(merged.bodies) == 1 + 2 * 2 * 5
    assert all(b["ignore_eos"] and b["model"] == "small" for b in bodies)
    images = [b["messages"][0]["content"][0]["image_url"]["url"] for b in bodies]
    assert len(set(images)) == len(images)
    table = (tmp_path / "throughput.md").read_text()
    assert table == capsys.readouterr().out
    assert table.splitlines()[2].startswith("| 1 | plain | ") and "| 1.00 |" in table.splitlines()[2]


def test_a_refused_request_ends_the_run_with_the_reason(serve, tmp_path):
    with pytest.raises(RuntimeError, match=r"answers 400: .*no room"):
        run(tmp_path, f"one={serve(1, fails=True).url}")
    assert not (tmp_path / "throughput.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "servers= is missing"),
        (["servers=here"], "servers='here' is not allowed"),
        (["servers=a=http://127.0.0.1:9", "concurrency=0"], "concurrency='0' is not allowed"),
        (["servers=a=http://127.0.0.1:9"], "no OpenAI-compatible server answers at http://127.0.0.1:9"),
    ],
)
def test_bad_words_and_missing_servers_give_exit_status_2(words, message, capsys):
    assert throughput.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_server_that_is_still_starting_is_awaited(serve, monkeypatch):
    server, refused = serve(tokens=7), []
    call = throughput.call

    def late(url, *rest):
        if len(refused) < 2:
            refused.append(url)
            raise ConnectionRefusedError("not yet")
        return call(url, *rest)

    monkeypatch.setattr(throughput, "call", late)
    monkeypatch.setattr(throughput.time, "sleep", lambda _: None)
    assert throughput.served_model(server.url, throughput.time.monotonic() + 30) == "small"
    refused.clear()
    with pytest.raises(ValueError, match="not yet"):
        throughput.served_model(server.url, throughput.time.monotonic() - 1)
