"""Requests per second of OpenAI-compatible servers, asked in turns: python eval/throughput.py key=value ...

    python eval/throughput.py servers=unmerged=http://127.0.0.1:8000,merged=http://127.0.0.1:8001

Every request shows a picture that no other one shows, so that no cache answers. All servers run all the time
and one of them is asked at a time; rounds go through them in turns. The first server is what the others are
compared with. A request that fails ends the run.
"""

import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from eval.helping import helped
from eval.pictures import data_url
from eval.readers import positives, servers
from llava_pitome.cli.bench.environment import machine
from llava_pitome.cli.options import Option, fields, folder, parse, whole

OPTIONS = {
    "servers": Option(
        None, servers, "name=http://host:port with commas", "what to ask; the first one is compared with"
    ),
    "concurrency": Option(
        (1, 8, 32), positives, "whole numbers from 1 with commas", "requests under way at a time"
    ),
    "requests": Option(64, whole(1), "a whole number from 1", "requests a round, at each concurrency"),
    "rounds": Option(3, whole(1), "a whole number from 1", "times that every server is asked"),
    "warmup": Option(8, whole(0), "a whole number from 0", "requests to each server in front, not counted"),
    "new_tokens": Option(16, whole(1), "a whole number from 1", "length of an answer, at most"),
    "side": Option(336, whole(8), "a whole number from 8", "pixels across a picture"),
    "words": Option(40, whole(1), "a whole number from 1", "words in a question"),
    "body": Option(
        {}, fields, "a JSON object", 'further fields of a request, such as {"ignore_eos": true} for vLLM'
    ),
    "wait": Option(0, whole(0), "a whole number from 0", "seconds in which all servers must be up"),
    "timeout": Option(600, whole(1), "a whole number from 1", "seconds that a request may take"),
    "output": Option("output/throughput", folder, "a folder", "where throughput.json and .md go"),
}


class Reply(NamedTuple):
    """What one request came to: seconds, and tokens of the prompt and of the answer."""

    seconds: float
    prompt: int
    answer: int


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
        if options["servers"] is None:
            raise ValueError("servers= is missing: name=http://host:port with commas")
        until = time.monotonic() + options["wait"]
        models = {name: model(url, until) for name, url in options["servers"].items()}
    except ValueError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    rows = measure(options, models)
    out = Path(options["output"])
    out.mkdir(parents=True, exist_ok=True)
    found = {"options": options, "models": models, "machine": machine(), "rows": rows}
    (out / "throughput.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "throughput.md").write_text(table(rows))
    print(table(rows), end="")
    return 0


def measure(options: dict[str, Any], models: dict[str, str]) -> list[dict[str, Any]]:
    """A row for every server and concurrency, with what each round came to."""
    seeds = count()
    ask = {name: partial(reply, options["servers"][name], model, options) for name, model in models.items()}
    for name in ask:
        batch(ask[name], seeds, options["warmup"], 1)
    rows = {(n, name): [] for n in options["concurrency"] for name in ask}
    for turn in range(options["rounds"]):
        for n in options["concurrency"]:
            names = list(ask) if turn % 2 == 0 else list(ask)[::-1]
            for name in names:
                rows[n, name].append(batch(ask[name], seeds, options["requests"], n))
    return [summary(name, n, rounds) for (n, name), rounds in rows.items()]


def batch(ask: Any, seeds: Iterator[int], requests: int, concurrency: int) -> dict[str, Any]:
    """Asks so many requests, so many at a time; their rate, and every reply."""
    bodies = [next(seeds) for _ in range(requests)]
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        replies = list(pool.map(ask, bodies))
    return {"rate": requests / (time.perf_counter() - started), "replies": replies}


def summary(name: str, concurrency: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds of one server at one concurrency say together."""
    replies = [r for one in rounds for r in one["replies"]]
    return {
        "server": name,
        "concurrency": concurrency,
        "rates": [one["rate"] for one in rounds],
        "requests_per_second": statistics.median(one["rate"] for one in rounds),
        "seconds": statistics.median(r.seconds for r in replies),
        "prompt_tokens": statistics.mean(r.prompt for r in replies),
        "answer_tokens": statistics.mean(r.answer for r in replies),
    }


def reply(url: str, model: str, options: dict[str, Any], seed: int) -> Reply:
    """Asks about one picture."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(seed, options["side"])}},
        {"type": "text", "text": " ".join(["what"] * options["words"])},
    ]
    body = {
        "model": model, "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": options["new_tokens"],
    } | options["body"]  # fmt: skip
    started = time.perf_counter()
    usage = call(f"{url}/v1/chat/completions", options["timeout"], body)["usage"]
    return Reply(time.perf_counter() - started, usage["prompt_tokens"], usage["completion_tokens"])


def model(url: str, until: float) -> str:
    """The name of what a server serves, once it is up.

    Args:
        url: of the server.
        until: when it must be up, as `time.monotonic()` tells.

    Raises:
        ValueError: nothing answers there as an OpenAI-compatible server does.
    """
    while True:
        try:
            return call(f"{url}/v1/models", 30)["data"][0]["id"]
        except (OSError, KeyError, IndexError, RuntimeError, json.JSONDecodeError) as error:
            if time.monotonic() > until:
                raise ValueError(f"no OpenAI-compatible server answers at {url}: {error}") from error
        time.sleep(1)


def call(url: str, timeout: int, body: dict[str, Any] | None = None) -> Any:
    """What a server says to one call.

    Raises:
        RuntimeError: it refuses; with its reason.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{url} answers {error.code}: {error.read().decode(errors='replace')}") from error


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [
        "| concurrency | server | requests/s | min to max | times as many | seconds each | prompt tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    first = {}
    for row in rows:
        base = first.setdefault(row["concurrency"], row["requests_per_second"])
        spread = f"{min(row['rates']):.2f} to {max(row['rates']):.2f}"
        lines.append(
            f"| {row['concurrency']} | {row['server']} | {row['requests_per_second']:.2f} | {spread} | "
            f"{row['requests_per_second'] / base:.2f} | {row['seconds']:.3f} | {row['prompt_tokens']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
