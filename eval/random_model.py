"""Writes a LLaVA of real shapes with random weights: python eval/random_model.py key=value ...

For measuring servers, since speed depends on shapes alone. The tokenizer and the chat template are those of
the embedded model, and weights are named as vLLM's own LLaVA and transformers both read them. What it says
means nothing.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from helping import helped

from llava_pitome import embedded
from llava_pitome.options import Option, folder, one_of, parse

NAMES = ("llava-7b-2layer", "llava-7b")
OPTIONS = {
    "name": Option(NAMES[0], one_of(*NAMES), " | ".join(NAMES), "which shapes; 2.1 and 14 GB"),
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
    """Builds the model of a name in NAMES in bfloat16 and writes it with its processor."""
    import torch

    from llava_pitome.bench.targets import build
    from llava_pitome.vllm_plugin import renamed

    model = build(name, torch.bfloat16, "cpu").model
    processor = fitting(model.config)
    model.config.image_token_id = processor.image_token_id
    with tempfile.TemporaryDirectory(dir=into.parent if into.parent.is_dir() else None) as beside:
        model.save_pretrained(beside)
        del model
        renamed.write(Path(beside), into)
    processor.save_pretrained(into)
    return into


def fitting(config: Any) -> Any:
    """The embedded model's processor, with pictures as large and patches as wide as a config says."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(embedded.PATH)
    side, processor.patch_size = config.vision_config.image_size, config.vision_config.patch_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
