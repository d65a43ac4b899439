"""Writes a LLaVA of real shapes with random weights: python eval/random_model.py key=value ...

For measuring servers, since speed depends on shapes alone. The tokenizer and the chat template are those of
the embedded model, and weights are named as vLLM's own LLaVA and transformers both read them. What it says
means nothing.
"""

import sys
import tempfile
from pathlib import Path

from eval.helping import helped
from llava_pitome.cli.bench.targets import LLAVA_TARGETS, save_checkpoint
from llava_pitome.cli.options import Option, folder, one_of, parse

OPTIONS = {
    "name": Option(
        LLAVA_TARGETS[0], one_of(*LLAVA_TARGETS), " | ".join(LLAVA_TARGETS), "which shapes; 2.1 and 14 GB"
    ),
    "output": Option(
        "output/random", folder, "a folder", "where the checkpoint goes, in a folder of its name"
    ),
}


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        options = parse(words, OPTIONS)
    except ValueError as error:
        print(f"random_model: {error}", file=sys.stderr)
        return 2
    print(write(options["name"], Path(options["output"]) / options["name"]))
    return 0


def write(name: str, into: Path) -> Path:
    """Writes the model of a name, with a processor, and returns where."""
    from llava_pitome.integrations.vllm import renamed

    with tempfile.TemporaryDirectory(dir=into.parent if into.parent.is_dir() else None) as beside:
        save_checkpoint(name, Path(beside))
        return renamed.write(Path(beside), into)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
