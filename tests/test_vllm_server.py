"""scripts/serve_vllm.sh through the OpenAI API against transformers; run by scripts/test_vllm.sh."""

import base64
import io
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import openai
import pytest
from vllm_given import PATCHES, WORDS, Answerer, picture, prompt, question

from llava_pitome import MergeConfig, embedded
from llava_pitome.integrations.vllm.serve import SERVER

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds in which a server must be up


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def up(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module", params=[0.9, 1.0], ids=["merged", "unmerged"])
def served(request, tmp_path_factory):
    """A client of a server, and how transformers answers under its config."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    words = [f"ratio={request.param}", "model=embedded", "dtype=float32", f"port={port}"]
    words.append("vllm=--enforce-eager --max-model-len 1024")
    with log.open("w") as file:
        process = subprocess.Popen(["bash", ROOT / "scripts/serve_vllm.sh", *words], stdout=file, stderr=file)
    try:
        started = time.monotonic()
        while not up(port):
            assert process.poll() is None and time.monotonic() - started < PATIENCE, log.read_text()
            time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        yield client, Answerer(embedded.PATH, MergeConfig(ratio=request.param)), request.param
    finally:
        if process.poll() is None:
            process.terminate()  # the script has become the server, which ends its own processes
            process.wait(60)


def url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def say(client, text, pictures=(), **options):
    """A greedy reply to one message."""
    content = [
        {"type": "image_url", "image_url": {"url": url(p) if not isinstance(p, str) else p}} for p in pictures
    ]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return client.chat.completions.create(
        model="embedded", messages=messages, temperature=0, max_tokens=WORDS, **options
    )


def check(served, text, pictures):
    """Asserts that the answer and the tokens of the prompt are transformers'."""
    client, expect, _ = served
    reply = say(client, text, pictures)
    length, ids, _, answer = expect(prompt(text, len(pictures)), pictures)
    assert reply.choices[0].message.content.strip() == answer.strip()
    assert reply.usage.prompt_tokens == length
    assert reply.usage.completion_tokens == len(ids)
    return length


def test_questions_about_a_picture_are_answered_as_transformers_does(served):
    for seed in range(10):
        check(served, question(seed), [picture(seed)])


def test_usage_counts_the_tokens_that_merging_leaves(served):
    client, _, ratio = served
    with_picture = say(client, question(0), [picture(0)]).usage.prompt_tokens
    without = say(client, question(0)).usage.prompt_tokens
    line_break = 1  # behind the picture
    assert with_picture - without - line_break == (65 if ratio == 0.9 else PATCHES)


def test_several_pictures_in_one_prompt(served):
    check(served, question(2), [picture(2), picture(3), picture(4)])


def test_a_prompt_without_a_picture(served):
    check(served, "what is a red cat?", [])


def test_32_requests_at_once_lose_nothing_and_change_no_answer(served):
    client, expect, _ = served
    with ThreadPoolExecutor(32) as pool:
        replies = list(pool.map(lambda seed: say(client, question(seed), [picture(seed)]), range(32)))
    answers = [reply.choices[0].message.content.strip() for reply in replies]
    expected = [expect(prompt(question(seed)), [picture(seed)])[3].strip() for seed in range(32)]
    assert answers == expected


def test_a_streamed_answer_is_the_same(served):
    client, expect, _ = served
    parts = say(client, question(1), [picture(1)], stream=True)
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said.strip() == expect(prompt(question(1)), [picture(1)])[3].strip()


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.png", "http://example.com/a.png"])
def test_no_address_is_fetched_where_none_was_allowed(served, address):
    with pytest.raises(openai.BadRequestError):
        say(served[0], "what is this?", [address])


def test_no_file_of_the_server_is_read(served):
    with (  # a client of its own, since vLLM closes the connection behind this error
        openai.OpenAI(base_url=served[0].base_url, api_key="none", max_retries=0) as client,
        pytest.raises(openai.APIStatusError, match="Cannot load local files"),
    ):
        say(client, "what is this?", ["file:///etc/passwd"])


def test_a_picture_that_is_none_gets_a_4xx(served):
    with pytest.raises(openai.BadRequestError):
        say(served[0], "what is this?", ["data:image/png;base64," + base64.b64encode(b"no picture").decode()])


def test_vllm_started_without_the_script_refuses_a_decoder_config_with_the_reason():
    command = [sys.executable, "-m", SERVER, "--model", str(embedded.PATH), "--port", str(free_port())]
    override = ["--hf-overrides", '{"token_merging": {"decoder": {"1": 0.5}}}']
    done = subprocess.run(
        [*command, *override], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode != 0
    assert "decoder={1: 0.5} is not supported under vLLM" in done.stdout + done.stderr
    assert "Uvicorn" not in done.stdout + done.stderr


def test_the_script_exits_with_2_for_a_key_that_is_not_allowed():
    command = ["bash", ROOT / "scripts/serve_vllm.sh", "rato=0.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 2
    assert "did you mean 'ratio'?" in done.stderr
