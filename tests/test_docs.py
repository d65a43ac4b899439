"""What the how-to pages in docs tell to run, run as it stands there; scripts/test_docs.sh runs this."""

import ast
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from llava_pitome.embedded.render import render
from llava_pitome.embedded.scenes import scene
from llava_pitome.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMAND = [sys.executable, "-m", "llava_pitome"]
ENDLESS = {"web": "http://127.0.0.1:7860", "serve": "http://127.0.0.1:8000/health"}  # by command


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines(page: str) -> list[str]:
    return "".join(blocks(page, "bash")).splitlines()


def shell(line: str, output: Path) -> str:
    """What a line writes, typed at the top of the checkout, with `output` in the place of its own output."""
    typed = line.replace("output/", f"{shlex.quote(str(output))}/").replace(".venv/bin/", "")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(
        ["bash", "-c", typed], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A folder for all that the pages' commands write; later ones read what earlier ones wrote."""
    return tmp_path_factory.mktemp("output")


@pytest.mark.parametrize("line", lines("evaluate.md"))
def test_evaluations_of_the_page_end_well(output, line):
    assert shell(line, output)


def test_the_evaluations_wrote_what_the_page_says(output):
    assert (output / "quick/results.json").exists()
    assert (output / "small/report/report.html").exists()


@pytest.mark.parametrize("line", lines("training.md"))
def test_trainings_of_the_page_end_well(output, line):
    shell(line, output)


def test_the_trainings_wrote_adapters_that_load_and_become_plain(output, monkeypatch):
    for name in ("torchrun", "deepspeed", "zero3", "own"):
        assert (output / name / "adapter_model.safetensors").exists()
    monkeypatch.chdir(output.parent)
    output.rename("output")
    (block,) = blocks("training.md", "python")
    try:
        exec(block, {})
        assert (output.parent / "plain/model.safetensors").exists()
    finally:
        (output.parent / "output").rename(output)


@pytest.mark.parametrize("page", ["add_a_method.md", "add_a_place.md"])
def test_what_is_added_works_as_the_page_says(page, capsys):
    before = dict(METHODS)
    names: dict = {}
    try:
        for block in blocks(page, "python"):
            exec(block, names)
    finally:
        METHODS.clear()
        METHODS.update(before)
    if page == "add_a_method.md":
        lengths = ast.literal_eval(capsys.readouterr().out)
        assert lengths[-1] == 65 and lengths == sorted(lengths, reverse=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pages' commands are typed: with the picture that they speak of."""
    Image.fromarray(render(scene(5))).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str) -> str:
    """What a line of the shell writes, `llava-pitome` being this checkout's."""
    said, _, piped = line.rpartition("|")
    words = shlex.split(piped)
    assert words[0] == "llava-pitome"
    typed = shlex.split(said)[1] if said else ""
    done = subprocess.run([*COMMAND, *words[1:]], input=typed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(line: str):
    """A command that goes on until it is ended, once it answers at its address."""
    words = shlex.split(line)
    process = subprocess.Popen([*COMMAND, *words[1:]], stdout=subprocess.PIPE, text=True)
    try:
        answered(process, ENDLESS[words[1]])
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def answered(process: subprocess.Popen, address: str) -> None:
    until = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                assert response.status == 200
                return
        except OSError:
            assert process.poll() is None, "it ended by itself"
            assert time.monotonic() < until, f"nothing answers at {address}"
            time.sleep(0.5)


def ends(page: str) -> list[str]:
    return [line for line in lines(page) if line.partition(" # ")[0].split()[1] not in ENDLESS]


@pytest.mark.parametrize("line", ends("chat.md"))
def test_chats_of_the_page_answer(folder, line):
    shown = run(line)
    assert "echo" not in line or re.search(r"\[39 image tokens of 196 · .* GB\]", shown)


@pytest.mark.parametrize("line", ends("draw.md"))
def test_the_picture_of_the_page_is_the_one_in_the_repository(folder, line):
    run(line)
    drawn = Image.open(folder / "draw.png").convert("RGB")
    shown = Image.open(DOCS / "pictures/draw.png").convert("RGB")
    assert drawn.size == shown.size and drawn.tobytes() == shown.tobytes()


def test_the_python_of_drawing_runs(folder):
    names: dict = {}
    for block in blocks("draw.md", "python"):
        exec(block, names)
    assert (folder / "tokens.png").exists() and (folder / "energy.png").exists()
    assert names["history"].merges[-1].after.tokens == 65


def test_the_web_page_comes_up_as_the_page_says(folder):
    (line,) = [line for line in lines("chat.md") if " web " in line]
    with running(line):
        pass


def test_the_server_answers_the_pages_client(folder, capsys):
    (line,) = lines("serving.md")
    with running(line):
        for block in blocks("serving.md", "python"):
            exec(block, {})
    words = capsys.readouterr().out.split()
    assert len(words) >= 2 and 65 < int(words[-1]) < 130
