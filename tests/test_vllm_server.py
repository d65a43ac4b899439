"""vLLM's server with the plugin against transformers, and the commands of docs/serving_vllm.md.

Run by scripts/test_vllm.sh. The commands run as the page has them, but on free ports, in float32 and, for
models from the hub and of random weights, with the embedded model.
"""

import base64
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import openai
import pytest
from vllm_reference import NEW_TOKENS, PATCHES, Reference, image, prompt, question

from eval import random_model
from llava_pitome import MergeConfig, embedded
from llava_pitome.cli.options import parse

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```bash\n(.*?)^```$", (ROOT / "docs/serving_vllm.md").read_text(), re.MULTILINE | re.DOTALL
)
CONFIG = MergeConfig(ratio=0.9)
TOKENS = CONFIG.tokens_at(PATCHES, 11)
TIMEOUT = 600  # seconds
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def block(words: str) -> str:
    """The page's one block of commands with these words, without comments."""
    (commands,) = [text for text in BLOCKS if words in text]
    return "\n".join(line.partition("  #")[0].rstrip() for line in commands.splitlines())


START, API_SERVER, CURL = block("serve_vllm.sh ratio=0.9 model=embedded"), block("api_server"), block("curl")
EMBEDS, THROUGHPUT = block("image_embeds"), block("throughput")
WRITE, PLAIN, MERGED, MEASURE = THROUGHPUT.splitlines()
RANDOM, HUB = "model=output/random/llava-7b-2layer", "llava-hf/llava-1.5-7b-hf"


def bash(line, **options):
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=TIMEOUT, **options
    )


def output_of(line):
    done = bash(line, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def stop(process):
    if process.poll() is None:
        process.terminate()  # bash has become the server, which ends its own processes
        process.wait(60)


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    """The ports of three servers: merged and unmerged by the script, merged by vLLM's own command."""
    folder = tmp_path_factory.mktemp("servers")
    plain = PLAIN.removesuffix(" port=8000 &").replace(RANDOM, "model=embedded")
    lines = {
        "merged": f"{START} dtype=float32 port=",
        "unmerged": f"{plain} dtype=float32 output={folder} vllm=--enforce-eager port=",
        "vllm's command": API_SERVER.replace(HUB, f"{embedded.PATH} --served-model-name embedded")
        + " --enforce-eager --port ",
    }
    with ExitStack() as stack:
        ports, servers = {}, {}
        for name, line in lines.items():
            with socket.create_server(("127.0.0.1", 0)) as free:
                ports[name] = free.getsockname()[1]
            log = stack.enter_context((folder / name).open("w"))
            command = ["bash", "-c", f"exec {line}{ports[name]}"]
            servers[name] = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=log, stderr=log)
            stack.callback(stop, servers[name])
        until = time.monotonic() + TIMEOUT
        for name, port in ports.items():
            while not is_up(port):
                running = servers[name].poll() is None and time.monotonic() < until
                assert running, (folder / name).read_text()
                time.sleep(0.5)
        yield ports


@pytest.fixture(scope="module", params=["merged", "unmerged"])
def server(request, ports):
    """A client of one of the script's servers, the answers of transformers, and image tokens in a prompt."""
    merged = request.param == "merged"
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{ports[request.param]}/v1", api_key="none", max_retries=0
    )
    return client, Reference(embedded.PATH, CONFIG if merged else None), TOKENS if merged else PATCHES


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(client, text, urls=(), **options):
    """A greedy answer to one message."""
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return client.chat.completions.create(
        model="embedded", messages=messages, temperature=0, max_tokens=NEW_TOKENS, **options
    )


def test_every_command_of_the_page_is_run_here_or_equal_to_one_that_is():
    assert len(BLOCKS) == len({START, API_SERVER, CURL, EMBEDS, THROUGHPUT})
    assert {*shlex.split(MERGED.replace(RANDOM, "model=embedded"))} - {"port=8001", "&"} == {*START.split()}
    python, flag, module, *words = WRITE.split()
    assert (python, flag, module) == ("python", "-m", "eval.random_model")
    options = parse(words, random_model.OPTIONS)  # tests/test_bench.py writes a small one
    assert f"model={options['output']}/{options['name']}" == RANDOM


@pytest.mark.parametrize("seeds", [*((n,) for n in range(10)), (2, 3, 4), ()], ids=str)
def test_answers_equal_those_of_transformers(server, seeds):
    client, reference, _ = server
    text, images = question(seeds[0]) if seeds else "what is a red cat?", [image(seed) for seed in seeds]
    reply, expected = chat(client, text, map(png, images)), reference(prompt(text, len(images)), images)
    assert reply.choices[0].message.content.strip() == expected.text.strip()
    assert reply.usage.prompt_tokens == expected.prompt_tokens
    assert reply.usage.completion_tokens == len(expected.ids)


def test_usage_counts_image_tokens_after_merging(server):
    client, _, tokens = server
    with_image = chat(client, question(0), [png(image(0))]).usage.prompt_tokens
    line_break = 1  # after the image
    assert with_image - chat(client, question(0)).usage.prompt_tokens - line_break == tokens


def test_32_concurrent_requests_are_answered_as_one_by_one(server):
    client, reference, _ = server
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda seed: chat(client, question(seed), [png(image(seed))]), range(32)))
    answers = [reply.choices[0].message.content.strip() for reply in replies]
    assert answers == [reference(prompt(question(n)), [image(n)]).text.strip() for n in range(32)]


def test_a_streamed_answer_is_the_same(server):
    client, reference, _ = server
    chunks = chat(client, question(1), [png(image(1))], stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == reference(prompt(question(1)), [image(1)]).text.strip()


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://127.0.0.1:1/a.png", None),
        ("http://example.com/a.png", None),
        ("file:///etc/passwd", "Cannot load local files"),
        ("data:image/png;base64," + base64.b64encode(b"no image").decode(), None),
    ],
)
def test_images_other_than_data_urls_are_refused(ports, url, message):
    base = f"http://127.0.0.1:{ports['merged']}/v1"  # a client each, as vLLM may close the connection
    with (
        openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIStatusError, match=message) as error,
    ):
        chat(client, "what is this?", [url])
    assert message or error.value.status_code == 400


@pytest.mark.parametrize("name", ["merged", "vllm's command"])
def test_the_pages_request_is_answered_from_merged_tokens(ports, name):
    line = CURL.replace("data:image/png;base64,...", png(image(0))).replace("curl", "curl -sS", 1)
    assert ":8000/" in line
    reply = json.loads(output_of(line.replace(":8000/", f":{ports[name]}/")))
    assert reply["choices"][0]["message"]["content"]
    assert TOKENS < reply["usage"]["prompt_tokens"] < PATCHES


def test_throughput_is_measured_as_the_page_says(ports, tmp_path):
    line = MEASURE.replace("8000", str(ports["unmerged"])).replace("8001", str(ports["merged"]))
    output_of(f"{line} output={tmp_path} requests=2 concurrency=1,2 rounds=1 warmup=1 new_tokens=2")
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    lengths = {name: {r["prompt_tokens"] for r in rows if r["server"] == name} for name in ports}
    (unmerged,), (merged,) = lengths["unmerged"], lengths["merged"]
    assert unmerged - merged == PATCHES - TOKENS


def test_merged_features_go_into_an_unmodified_vllm():
    lengths = [line.split()[0] for line in output_of(EMBEDS).splitlines() if "image tokens" in line]
    assert lengths == ["196"] * 4 + ["65"] * 4 + ["20"] * 4 + ["98"] * 4


@pytest.mark.parametrize(
    "line, status, message",
    [
        ("bash scripts/serve_vllm.sh rato=0.9", 2, "did you mean 'ratio'?"),
        (
            API_SERVER.replace(HUB, str(embedded.PATH)).replace('"ratio": 0.9', '"decoder": {"1": 0.5}'),
            1,
            "decoder={1: 0.5} is not supported under vLLM",
        ),
    ],
)
def test_a_refused_config_ends_the_command(line, status, message):
    done = bash(line, check=False)
    assert done.returncode == status
    assert message in done.stdout + done.stderr
    assert "Uvicorn" not in done.stdout + done.stderr
