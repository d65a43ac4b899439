"""The commands and the Python of README.md and docs/*.md run; scripts/test_docs.sh runs this file.

Each command runs once, in this process, with the small numbers of SHORTER. Not run: what other tests run
(docs/original_llava.md, docs/serving_vllm.md, the bench, the launchers of training), and the test scripts.
"""

import ast
import io
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("evaluate", "accuracy", "training", "embedded_model", "performance")),
    *(f"docs/{name}.md" for name in ("chat", "draw", "serving")),
]
SHORTER = {
    r"limit=\d+": "limit=4",
    r"eval_vqav2.sh ratio=0.9$": r"\g<0> model=embedded limit=4 output=output/first",
    r"blank=true$": r"\g<0> limit=4 output=output/blank",
    r"-m eval.sweep .*batch_size=96$": r"\g<0> dry_run=true",
    r"-m eval.report$": r"\g<0> input=output/small draws=100 examples=0",
    r"max_steps=\d+": "max_steps=1",
    r"scenes=\d{3,}": "scenes=32",
    r"evaluate=true ": "",  # test_lora_processes.py covers it
    r"output=output/adapters/": "output=output/",
    r" output/adapters/": " eval/results/adapters/",  # compare runs that were evaluated
    r"-m train.bench$": r"\g<0> rounds=1 steps=2 scenes=32 output=output/bench",
    r"-m train.embedded$": r"\g<0> tower_steps=1 language_steps=1 together_steps=1 batch_size=4 validate=4 "
    "output=output/embedded",
    r"-m train.embedded model=next$": r"\g<0> heads_steps=1 tower_steps=1 together_steps=1 batch_size=4 "
    "turns=2 validate=8 output=output/embedded-next",
    r"-m eval.merge_image$": r"\g<0> output=merged.png",
    r"-m timeit": r"\g<0> -n 1 -r 1",
}
ELSEWHERE = (
    r"^llava-pitome bench|^bash scripts/(test|serve_vllm)|^(torchrun|deepspeed|accelerate) .*train.run"
)
SERVERS = r"llava-pitome (web|serve)\b"


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page in a language, also those inside a list."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [line.partition(" # ")[0].strip() for line in lines]


def module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments."""
    for i, word in enumerate(words):
        if word in ("-m", "--module"):
            return words[i + 1], words[i + 2 :]
        if word == "llava-pitome":
            return "llava_pitome", words[i + 1 :]
        if word.endswith(".py"):
            return ".".join(Path(word).with_suffix("").parts[-2:]), words[i + 1 :]
        if word.endswith(".sh"):  # its last command, which takes the arguments as "$@"
            script = (ROOT / "scripts" / Path(word).name).read_text().replace("\\\n", " ")
            script = script.replace("$scripts", str(ROOT / "scripts")).replace("$root", str(ROOT))
            last = shlex.split(script[script.rindex("exec ") :])
            return module_of([*last[1 : last.index("$@")], *words[i + 1 :]])
    raise AssertionError(f"{words} runs no module of the project")


MERGE_IMAGE = ".venv/bin/python -m eval.merge_image"  # in the README's prose
LINES = dict.fromkeys([*(line for page in PAGES for line in commands(page)), MERGE_IMAGE])
CASES = [line for line in LINES if not re.search(ELSEWHERE, line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which commands run: an image, and all that earlier commands wrote."""
    from PIL import Image

    from llava_pitome.embedded.render import render
    from llava_pitome.embedded.scenes import scene

    folder = tmp_path_factory.mktemp("folder")
    Image.fromarray(render(scene(5))).save(folder / "picture.png")
    for name in ("eval", "train"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command in this process and returns what it prints."""

    def run(line: str) -> str:
        for long, short in SHORTER.items():
            line = re.sub(long, short, line)
        echo, _, line = line.rpartition(" | ")
        module, arguments = module_of(shlex.split(line))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(shlex.split(echo)[1:])))
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("line", [line for line in CASES if not re.search(SERVERS, line)])
def test_command_ends_well(run, line):
    printed = run(line)
    assert "echo" not in line or "[39 image tokens of 196" in printed


def test_commands_wrote_what_the_pages_name(folder):
    for name in ("quick/results.json", "small/report/report.html", "embedded/model.safetensors"):
        assert (folder / "output" / name).exists()
    for name in ("lora", "own", "best-tower-plain", "paper-plain"):
        assert (folder / "output" / name / "adapter_model.safetensors").exists()


@contextmanager
def serving(line: str, folder: Path):
    """Runs a server on a free port until the block ends; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = re.sub(r"(--port) \d+", rf"\1 {port}", line).split()
    process = subprocess.Popen([sys.executable, "-m", "llava_pitome", *words[1:]], cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(address + ("/health" if "serve" in words else "/"), timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < until, f"nothing answers at {address}"
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_web_page_starts(folder):
    (line,) = [line for line in CASES if "llava-pitome web" in line]
    with serving(line, folder):
        pass


def test_server_answers_the_client_of_the_page(folder, monkeypatch, capsys):
    (line,) = [line for line in CASES if "llava-pitome serve" in line]
    (block,) = blocks("docs/serving.md", "python")
    monkeypatch.chdir(folder)
    with serving(line, folder) as address:
        exec(block.replace("http://127.0.0.1:8000", address), {})
    words = capsys.readouterr().out.split()
    assert len(words) >= 2 and 65 < int(words[-1]) < 130


def test_python_of_training_loads_the_adapter_and_trains_with_trl(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CI", "1")  # TRL sends telemetry without it
    names: dict = {}
    for block in blocks("docs/training.md", "python"):
        exec(block, names)
    assert (folder / "plain/model.safetensors").exists()
    assert (folder / "output/sft/adapter_model.safetensors").exists()
    assert names["model"].config.token_merging["tokens"] == 39


def test_python_of_drawing_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in blocks("docs/draw.md", "python"):
        exec(block, names)
    assert (folder / "tokens.png").exists() and (folder / "energy.png").exists()


@pytest.mark.parametrize("page", ["docs/add_a_method.md", "docs/add_a_place.md"])
def test_example_of_an_extension_runs(page, capsys):
    from llava_pitome import METHODS

    before = dict(METHODS)
    names: dict = {}
    try:
        for block in blocks(page, "python"):
            exec(block, names)
    finally:
        METHODS.clear()
        METHODS.update(before)
    if "method" in page:
        lengths = ast.literal_eval(capsys.readouterr().out)
        assert lengths[-1] == 65 and lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("drawn", "committed"),
    [("draw.png", "docs/pictures/draw.png"), ("merged.png", "eval/results/merged.png")],
)
def test_committed_image_is_what_its_command_drew(folder, drawn, committed):
    """But for single merges: other CPUs round bfloat16 differently."""
    import numpy as np
    from PIL import Image

    one, two = (
        np.asarray(Image.open(path).convert("RGB"), float) for path in (folder / drawn, ROOT / committed)
    )
    assert one.shape == two.shape and np.abs(one - two).mean() < 5


def test_python_of_the_readme_answers_with_the_tokens_it_states():
    from PIL import Image

    from llava_pitome.embedded.render import render
    from llava_pitome.embedded.scenes import scene

    block, pipeline = blocks("README.md", "python")
    name = "llava-hf/llava-1.5-7b-hf"
    assert name in block and "54 image tokens instead of 576" in block
    names = {"image": Image.fromarray(render(scene(5)))}
    exec(block.replace(name, "embedded"), names)
    image = names["model"].config.image_token_id
    assert (names["inputs"]["input_ids"] == image).sum() == 65  # of 196, with "embedded"
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["MergeConfig"](ratio=0.9).lengths(576, 23)[-1] == 54
    exec(pipeline, names)
    assert names["answer"][0]["generated_text"]
