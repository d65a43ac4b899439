"""The shell scripts that users call, from any folder."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
ECHO = '#!/bin/sh\necho "$(pwd)" "$@"\n'  # in place of Python
MODULES = {
    "eval_vqav2.sh": "eval.run",
    "eval_all.sh": "eval.run",
    "train_lora.sh": "train.run",
    "table3.sh": "eval.recipe",
    "field.sh": "eval.recipe",
    "next.sh": "eval.recipe",
    "onevision.sh": "eval.recipe",
}


@pytest.mark.parametrize("venv", [None, "relative folder", "absolute"])
@pytest.mark.parametrize("script", MODULES)
def test_scripts_run_the_checkouts_environment_in_the_callers_folder(script, venv, tmp_path):
    checkout, caller = tmp_path / "check out", tmp_path / "caller"
    for folder in (checkout / "scripts", caller):
        folder.mkdir(parents=True)
    for name in (script, "run_module.sh", "eval_vqav2.sh"):
        shutil.copy(SCRIPTS / name, checkout / "scripts")
    (checkout / "scripts/setup.sh").write_text("# everything is set up\n")
    environment = {"PATH": "/usr/bin:/bin"}
    if venv is not None:
        environment["VENV"] = str(tmp_path / venv) if venv == "absolute" else venv
    python = (
        checkout / environment.get("VENV", ".venv") / "bin/python"
    )  # an absolute path replaces the checkout
    python.parent.mkdir(parents=True)
    python.write_text(ECHO)
    python.chmod(0o755)
    command = ["bash", str(Path("../check out/scripts") / script), "ratio=0.9", "two words"]
    done = subprocess.run(command, cwd=caller, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{caller} -m {MODULES[script]} ")
    assert done.stdout.endswith(" ratio=0.9 two words\n")
    if MODULES[script] == "eval.recipe":
        assert f"/eval/recipes/{Path(script).stem}.txt ratio=0.9" in done.stdout
