"""Writes a LLaVA of real shapes with random weights: python -m eval.random_model key=value ...

For measuring servers, whose speed depends on shapes alone. The tokenizer and the chat template are the
embedded model's; the names of weights are those that vLLM's LLaVA and transformers both read.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from eval.command import run_command
from llava_pitome.cli.bench.targets import LLAVA_TARGETS, save_checkpoint
from llava_pitome.cli.options import Option, folder, one_of

OPTIONS = {
    "name": Option(LLAVA_TARGETS[0], one_of(*LLAVA_TARGETS), " | ".join(LLAVA_TARGETS), "which shapes; 2.1 and 14 GB"),
    "output": Option("output/random", folder, "a folder", "where a folder of that name is written"),
}


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return run_command("random_model", __doc__, OPTIONS, words, lambda options: options, _execute)


def _execute(options: dict[str, Any]) -> None:
    print(write(options["name"], Path(options["output"]) / options["name"]))


def write(name: str, target: Path) -> Path:
    """Writes the model of a name in LLAVA_TARGETS, with a processor, and returns its folder."""
    from llava_pitome.integrations.vllm import weight_names

    with tempfile.TemporaryDirectory(dir=target.parent if target.parent.is_dir() else None) as temporary:
        save_checkpoint(name, Path(temporary))
        return weight_names.copy_with_old_names(Path(temporary), target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
