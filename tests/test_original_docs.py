"""The commands of docs/original_llava.md, run with a tiny checkpoint instead of the published one."""

import re
import shlex
from pathlib import Path

import pytest

from llava_pitome import MergeConfig
from llava_pitome.cli import main as cli

ROOT = Path(__file__).parents[1]
PUBLISHED = "liuhaotian/llava-v1.5-7b"


def blocks(language):
    page = (ROOT / "docs/original_llava.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_of_the_page_runs(original_folder, block):
    assert PUBLISHED in block
    names = {}
    exec(block.replace(PUBLISHED, str(original_folder)), names)
    if "processor" in names:
        assert names["model"].config.token_merging == MergeConfig(ratio=0.9).to_dict()
    else:
        assert names["answer"].shape[0] == 1
        assert not hasattr(names["model"].config, "token_merging")


def test_the_commands_of_the_page_run_or_are_those_of_the_setup(original_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup, project = (ROOT / "scripts/setup.sh").read_text(), (ROOT / "pyproject.toml").read_text()
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line.replace(PUBLISHED, str(original_folder)))
        if words[0] == "llava-pitome":
            assert cli.main(words[1:]) == 0
        elif "--no-deps" in words:
            name, version = words[-1].split("==")
            assert f"{name.upper().replace('-', '_')}={version}" in setup
            assert f'--no-deps "{name}==' in setup
        else:
            assert words == ["pip", "install", "-e", ".[original]"]
            assert "\noriginal = [" in project
    assert (tmp_path / "converted" / "model.safetensors").exists()
