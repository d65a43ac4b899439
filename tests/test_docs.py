"""What the README and the pages in docs tell to run, run as it stands there; scripts/test_docs.sh runs this.

What would take hours runs with smaller numbers (SHORTER). The pages on the original package and on vLLM have
tests of their own, test_original_docs.py and test_vllm_docs.py.
"""

import ast
import json
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


README = "../README.md"
SHORTER = {
    r"scripts/eval_vqav2.sh ratio=0.9$": r"\g<0> model=embedded limit=32 output=output/first",
    r"blank=true$": r"\g<0> limit=32 output=output/blank",
    r"eval/sweep.py .*batch_size=96$": r"\g<0> dry_run=true",
    r"eval/report.py$": r"\g<0> input=output/small draws=100 examples=0",
    r"max_steps=2\d00": "max_steps=2",
    r"scenes=16384": "scenes=64",
    r"evaluate=true": r"\g<0> limit=32",
    r"-m train.bench$": r"\g<0> rounds=1 steps=2 scenes=32 output=output/bench",
    r"-m train.embedded$": r"\g<0> tower_steps=1 language_steps=1 together_steps=1 batch_size=4 validate=4 "
    "output=output/embedded",
    r"-m timeit": r"\g<0> -n 1 -r 1",
    r"bench --target embedded --quick$": r"\g<0> --output output/quick_bench",
    r"eval/picture.py$": r"\g<0> output=output/merged.png",
}


def blocks(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language, also those that belong to a point of a list."""
    text = (DOCS / page).read_text()
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def lines(page: str) -> list[str]:
    """The page's commands, without what is said behind them."""
    found = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [line.partition(" # ")[0].strip() for line in found]


def shorter(line: str) -> str:
    for long, short in SHORTER.items():
        line = re.sub(long, short, line)
    return line


def shell(line: str, output: Path) -> str:
    """What a line writes, typed at the top of the checkout, with `output` in the place of its own output."""
    typed = shorter(line).replace("output/", f"{shlex.quote(str(output))}/").replace(".venv/bin/", "")
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


@pytest.mark.parametrize("line", lines("accuracy.md"))
def test_the_commands_that_made_the_accuracies_run(output, line):
    assert shell(line, output)


def test_the_commands_that_made_the_accuracies_wrote_what_they_say(output):
    blank = json.loads((output / "blank/results.json").read_text())
    assert blank["options"]["blank"] and blank["options"]["limit"] == 32
    assert (output / "small/report/report.md").exists()


@pytest.mark.parametrize("line", lines("embedded_model.md"))
def test_the_training_of_the_embedded_model_ends_well(output, line):
    shell(line, output)
    assert (output / "embedded/model.safetensors").exists()


@pytest.mark.parametrize("line", [line for line in lines("performance.md") if "timeit" in line])
def test_what_is_timed_by_itself_runs(output, line):
    assert "1 loop, best of 1" in shell(line, output)


def test_the_bench_of_the_embedded_model_runs(output):
    line = "llava-pitome bench --target embedded --quick"
    assert f"`{line}`" in (DOCS / "performance.md").read_text()
    assert "| dense |" in shell(line, output)


def test_the_trainings_wrote_adapters_that_load_and_become_plain(output, monkeypatch):
    measured = ("adapters/best-tower-plain", "adapters/paper-plain")
    for name in ("torchrun", "deepspeed", "zero3", "own", *measured):
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
    return [line for line in lines(page) if line.split()[1] not in ENDLESS]


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
    assert names["trace"].merges[-1].after.tokens == 65


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


ELSEWHERE = {
    line for page in ("evaluate.md", "training.md", "draw.md", "serving_vllm.md") for line in lines(page)
}
CI = (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("line", [line for line in lines(README) if line not in {*ELSEWHERE, *CI}])
def test_what_the_readme_alone_tells_to_run_runs(folder, output, line):
    if line.startswith("bash"):
        assert shell(line, output)
    elif line.split()[1] in ENDLESS:
        with running(line):
            pass
    else:
        run(line)


def test_the_readmes_picture_is_what_its_command_draws(output):
    line = ".venv/bin/python eval/picture.py"
    assert f"`{line}`" in (DOCS / README).read_text()
    shell(line, output)
    drawn, shown = (Image.open(path) for path in (output / "merged.png", ROOT / "eval/results/merged.png"))
    assert drawn.size == shown.size and drawn.convert("RGB").tobytes() == shown.convert("RGB").tobytes()


def test_the_readmes_python_answers_with_as_many_tokens_as_it_says():
    (block,) = blocks(README, "python")
    name = "llava-hf/llava-1.5-7b-hf"
    assert name in block and "54 image tokens instead of 576" in block
    names = {"image": Image.fromarray(render(scene(5)))}
    exec(block.replace(name, "embedded"), names)
    image = names["model"].config.image_token_id
    assert (names["inputs"]["input_ids"] == image).sum() == 65  # of 196, with "embedded"
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["MergeConfig"](ratio=0.9).lengths(576, 23)[-1] == 54
