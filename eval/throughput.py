"""Requests per second of OpenAI-compatible servers: python -m eval.throughput key=value ...

    python -m eval.throughput servers=unmerged=http://127.0.0.1:8000,merged=http://127.0.0.1:8001

Every request has its own image, so that no cache answers. All servers stay up and one of them is measured at
a time, interleaved round by round. The others are compared with the first. A failed request ends the run.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count as count_up
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests

from eval.command import count, run_command
from eval.embedded_images import data_url, embedded_image
from llava_pitome.cli.bench.environment import machine
from llava_pitome.cli.options import Option, fields, folder, several, whole


def read_servers(text: str) -> dict[str, str]:
    """Reads names and addresses: plain=http://127.0.0.1:8000,merged=http://127.0.0.1:8001."""
    found: dict[str, str] = {}
    for word in text.split(","):
        name, _, url = word.partition("=")
        if not name or name in found or not url.startswith(("http://", "https://")):
            raise ValueError(word)
        found[name] = url.rstrip("/").removesuffix("/v1")
    return found


OPTIONS = {
    "servers": Option(None, read_servers, "name=http://host:port with commas", "what to measure"),
    "concurrency": Option(
        (1, 8, 32), several(whole(1)), "whole numbers from 1 with commas", "requests at a time"
    ),
    "requests": count(64, "requests per round, at each concurrency"),
    "rounds": count(3, "times that every server is measured"),
    "warmup": count(8, "requests to each server beforehand, not counted", low=0),
    "new_tokens": count(16, "length of an answer, at most"),
    "side": count(336, "pixels of an image's side", low=8),
    "words": count(40, "words of a question"),
    "body": Option(
        {}, fields, "a JSON object", 'further fields of a request, such as {"ignore_eos": true} for vLLM'
    ),
    "wait": count(0, "seconds within which all servers must be up", low=0),
    "timeout": count(600, "seconds that a request may take"),
    "output": Option("output/throughput", folder, "a folder", "for throughput.json and throughput.md"),
}


class Reply(NamedTuple):
    """The seconds of one request, and the tokens of its prompt and its answer."""

    seconds: float
    prompt: int
    answer: int


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return run_command("throughput", __doc__, OPTIONS, words, _prepare, _execute)


def _prepare(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The options, and the model that each server serves.

    Raises:
        ValueError: no servers, or one that does not answer in time.
    """
    if options["servers"] is None:
        raise ValueError("servers= is missing: name=http://host:port with commas")
    deadline = time.monotonic() + options["wait"]
    return options, {name: served_model(url, deadline) for name, url in options["servers"].items()}


def _execute(prepared: tuple[dict[str, Any], dict[str, str]]) -> None:
    """Measures, and writes both files."""
    options, models = prepared
    rows = measure(options, models)
    output = Path(options["output"])
    output.mkdir(parents=True, exist_ok=True)
    facts = {"options": options, "models": models, "machine": machine(), "rows": rows}
    (output / "throughput.json").write_text(json.dumps(facts, indent=1) + "\n")
    (output / "throughput.md").write_text(markdown(rows))
    print(markdown(rows), end="")


def measure(options: dict[str, Any], models: dict[str, str]) -> list[dict[str, Any]]:
    """A row for every server and concurrency, with the rate of each round."""
    seeds = count_up()
    send = {
        name: partial(request, options["servers"][name], model, options) for name, model in models.items()
    }
    for name in send:
        send_all(send[name], seeds, options["warmup"], 1)
    rounds = {(n, name): [] for n in options["concurrency"] for name in send}
    for turn in range(options["rounds"]):
        for n in options["concurrency"]:
            for name in list(send)[:: 1 if turn % 2 == 0 else -1]:
                rounds[n, name].append(send_all(send[name], seeds, options["requests"], n))
    return [summarise(name, n, found) for (n, name), found in rounds.items()]


def send_all(
    send: Callable[[int], Reply], seeds: Iterator[int], number: int, concurrency: int
) -> tuple[float, list[Reply]]:
    """Sends a number of requests, `concurrency` at a time; returns requests per second, and the replies."""
    images = [next(seeds) for _ in range(number)]
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(send, images))
    return number / (time.perf_counter() - start), replies


def summarise(name: str, concurrency: int, rounds: list[tuple[float, list[Reply]]]) -> dict[str, Any]:
    """The row of one server at one concurrency."""
    rates = [rate for rate, _ in rounds]
    replies = [reply for _, found in rounds for reply in found]
    return {
        "server": name,
        "concurrency": concurrency,
        "rates": rates,
        "requests_per_second": float(np.median(rates)),
        "seconds": float(np.median([reply.seconds for reply in replies])),
        "prompt_tokens": float(np.mean([reply.prompt for reply in replies])),
        "answer_tokens": float(np.mean([reply.answer for reply in replies])),
    }


def request(url: str, model: str, options: dict[str, Any], seed: int) -> Reply:
    """Sends a question about the image of a seed."""
    image = embedded_image(seed).resize((options["side"],) * 2)
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": " ".join(["what"] * options["words"])},
    ]
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": options["new_tokens"],
    } | options["body"]  # fmt: skip
    start = time.perf_counter()
    usage = call(f"{url}/v1/chat/completions", options["timeout"], body)["usage"]
    return Reply(time.perf_counter() - start, usage["prompt_tokens"], usage["completion_tokens"])


def served_model(url: str, deadline: float) -> str:
    """The name of the model that a server serves, once it is up.

    Args:
        url: of the server.
        deadline: when it must be up, in `time.monotonic()`.

    Raises:
        ValueError: no OpenAI-compatible server answers in time.
    """
    while True:
        try:
            return call(f"{url}/v1/models", 30)["data"][0]["id"]
        except (OSError, KeyError, IndexError, RuntimeError, json.JSONDecodeError) as error:
            if time.monotonic() > deadline:
                raise ValueError(f"no OpenAI-compatible server answers at {url}: {error}") from error
        time.sleep(1)


def call(url: str, timeout: int, body: dict[str, Any] | None = None) -> Any:
    """A server's reply to one call.

    Raises:
        RuntimeError: it refuses; with its reason.
    """
    reply = requests.request("GET" if body is None else "POST", url, json=body, timeout=timeout)
    if not reply.ok:
        raise RuntimeError(f"{url} answers {reply.status_code}: {reply.text}")
    return reply.json()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| concurrency | server | requests/s | min to max | times as many | seconds each | prompt tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    first = {}
    for row in rows:
        base = first.setdefault(row["concurrency"], row["requests_per_second"])
        lines.append(
            f"| {row['concurrency']} | {row['server']} | {row['requests_per_second']:.2f} | "
            f"{min(row['rates']):.2f} to {max(row['rates']):.2f} | {row['requests_per_second'] / base:.2f} | "
            f"{row['seconds']:.3f} | {row['prompt_tokens']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
