"""Trains an embedded model: python -m train.embedded [model=llava15|next] [key=value ...].

`llava15` is trained from scratch in three stages, since a language model cannot learn from features without
content. "tower": the vision tower learns to classify the content of every patch, which CLIP's training would
have taught it. "language": projector and language model learn to answer questions about frozen features.
"together": everything is trained, with the patch labels as an auxiliary loss. Merging is off, as in training
any other LLaVA.

`next`, a LLaVA-NeXT, starts from the weights of the embedded LLaVA-1.5. "heads": classifiers learn the
content of every patch from frozen features. "tower": so does the tower, which learns to read words.
"together": as above.

A run that was stopped continues from `output`.ckpt when it is started again. With
`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m train.embedded` two processes share each batch, which on two
cores is 1.5 times as fast as one process of two threads.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from llava_pitome.cli.options import Option, helped, one_of, parse
from train.embedded import llava15, llava_next

MODELS = {"llava15": (llava15.OPTIONS, llava15.train), "next": (llava_next.OPTIONS, llava_next.train)}
MODEL = Option("llava15", one_of(*MODELS), " | ".join(MODELS), "what is trained; the defaults depend on it")


def main(words: Sequence[str]) -> int:
    """Trains, writes the model, its processor and a log; returns the command's exit status."""
    own = [word for word in words if word.partition("=")[0] == "model"]
    try:
        name = parse(own, {"model": MODEL})["model"]
        options, train = MODELS[name]
        if helped(words, __doc__, {"model": MODEL} | options):
            return 0
        values = parse(words, {"model": MODEL} | options)
        del values["model"]
        _start(values)
        train(values)
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def _start(options: dict[str, Any]) -> None:
    """Joins the other processes, seeds the weights and chooses the device."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo" if options["device"] == "cpu" else "nccl")
    torch.manual_seed(options["seed"])
    if options["device"] == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.exit(main(sys.argv[1:]))
