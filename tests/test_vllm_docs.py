"""What docs/serving_vllm.md tells to run, run under vLLM; scripts/test_vllm.sh runs this.

A port of this machine stands in the place of each port of the page, the embedded model in that of models from
the hub, and a picture in that of the dots.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vllm_given import PATCHES, picture

from llava_pitome import MergeConfig, embedded

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/serving_vllm.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MERGED = MergeConfig(ratio=0.9).lengths(PATCHES, 11)[-1]
PATIENCE = 600  # seconds in which a server must be up
SMALL = " requests=2 concurrency=1,2 rounds=1 warmup=1 new_tokens=2"  # for what would take an hour
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def block(holds: str) -> str:
    """The page's one block of commands with these words, without what is said behind commands."""
    (found,) = [text for text in BLOCKS if holds in text]
    return "\n".join(line.partition("  #")[0].rstrip() for line in found.splitlines())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def said(line: str) -> str:
    """What a command writes."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def running(line: str, port: int, log: Path):
    """A server, once it is up, until it is ended."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=ROOT, env=ENV, stdout=file, stderr=file
        )
    try:
        until = time.monotonic() + PATIENCE
        while not up(port):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        if process.poll() is None:
            process.terminate()  # bash has become the server, which ends its own processes
            process.wait(60)


def up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def asked(port: int) -> dict:
    """What a server says to the page's request."""
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    line = block("curl").replace("base64,...", f"base64,{base64.b64encode(file.getvalue()).decode()}")
    assert ":8000/" in line
    return json.loads(
        said(line.replace(":8000/", f":{port}/").replace("curl", "curl --silent --show-error", 1))
    )


def test_every_block_of_the_page_has_a_test_here():
    tested = ("serve_vllm.sh ratio=0.9 model=embedded", "curl", "api_server", "image_embeds", "throughput")
    assert sorted(block(words) for words in tested) == sorted(block(text) for text in BLOCKS)


def test_the_pages_request_to_the_pages_server_counts_the_tokens_that_merging_leaves(tmp_path):
    port = free_port()
    line = block("serve_vllm.sh ratio=0.9 model=embedded")
    with running(f"{line} port={port}", port, tmp_path / "log"):
        reply = asked(port)
    assert reply["choices"][0]["message"]["content"]
    assert MERGED < reply["usage"]["prompt_tokens"] < PATCHES


def test_vllms_own_command_merges_without_the_script(tmp_path):
    port, hub = free_port(), "llava-hf/llava-1.5-7b-hf"
    line = block("api_server")
    assert hub in line
    line = line.replace(hub, f"{embedded.PATH} --served-model-name embedded") + f" --port {port}"
    with running(line, port, tmp_path / "log"):
        assert MERGED < asked(port)["usage"]["prompt_tokens"] < PATCHES


def test_merged_features_go_into_an_unmodified_vllm():
    lengths = [line.split()[0] for line in said(block("image_embeds")).splitlines() if "image tokens" in line]
    assert lengths == ["196"] * 4 + ["65"] * 4 + ["20"] * 4 + ["98"] * 4


def test_the_throughput_of_both_servers_is_measured_as_the_page_says(tmp_path):
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    text = block("throughput").replace("output/", f"{tmp_path}/")
    for port, free in ports.items():
        text = text.replace(port, free)
    write, *serve, measure = text.splitlines()
    with ExitStack() as servers:
        servers.callback(shutil.rmtree, tmp_path / "random", ignore_errors=True)  # 2 GB
        said(f"{write} output={tmp_path}/random")
        for line, port in zip(serve, ports.values(), strict=True):
            assert line.endswith(f"port={port} &")
            log = tmp_path / f"log-{port}"
            servers.enter_context(running(line.removesuffix("&"), int(port), log))
        said(f"{measure} output={tmp_path}/throughput{SMALL}")
    rows = json.loads((tmp_path / "throughput/throughput.json").read_text())["rows"]
    plain, merged = (
        {r["prompt_tokens"] for r in rows if r["server"] == name} for name in ("unmerged", "merged")
    )
    lengths = MergeConfig(ratio=0.9).lengths(576, 23)
    assert len(plain) == len(merged) == 1 and plain.pop() - merged.pop() == 576 - lengths[-1]
