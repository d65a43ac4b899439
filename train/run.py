"""Fine-tunes a LLaVA while its tokens are merged: python train/run.py key=value ...

Adapters on the language model (and the tower), the projector whole; the keys are in settings.py, and said by
help. With zero= or processes= the command starts itself again under torchrun; deepspeed, torchrun and
accelerate launch may start it too.
"""

import gc
import json
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fit
import launch
import lora
import resume
import settings
from broken import TooManyBroken
from settings import OPTIONS

from llava_pitome import MergeConfig
from llava_pitome.options import parse, usage

log = logging.getLogger("train")
# what may differ where a run goes on
FREE = ("output", "resume", "evaluate", "limit", "workers", "skip_broken", "save_steps", "log_steps")


def main(words: list[str]) -> int:
    """Trains; returns the command's exit status."""
    if {"help", "-h", "--help"} & set(words):
        print(f"{__doc__}\n{usage(OPTIONS)}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        options = parse(launch.without_rank(words), OPTIONS)
        merging = settings.check(options)
        launch.check(options)
        output = Path(options["output"])
        records, folder = fit.data(options)
        checkpoint = _start(output, options)
    except ValueError as error:
        return _refused(error)
    if not launch.launched() and (options["zero"] or options["processes"] > 1):
        launch.again(__file__, words, options["processes"])
    try:
        arguments = fit.arguments(options, output)  # first: ZeRO-3 divides weights as they are read
        model, processor = fit.model(options, merging, arguments)
        rows = fit.rows(options, records, folder, processor, model, output)
        model = lora.wrap(model, options)
    except ValueError as error:
        return _refused(error)
    try:
        _train(options, merging, model, processor, rows, arguments, checkpoint)
    except TooManyBroken as error:  # a picture, on the way
        return _stopped(error, rows, output)
    return 0


def _refused(error: ValueError) -> int:
    print(f"train: {error}", file=sys.stderr)
    return 2


def _stopped(error: TooManyBroken, rows: Any, output: Path) -> int:
    """Says which rows ended a run, and how it goes on."""
    try:
        rows.broken.check()
    except TooManyBroken as told:  # the same, without the traceback of a process that loads
        error = told
    if any(output.glob("checkpoint-*")):
        error = TooManyBroken(
            f"{error}. With a higher skip_broken=, resume=true goes on from the last checkpoint"
        )
    return _refused(error)


def _start(output: Path, options: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        ValueError: there is none, it was made with other options, or one would be written over.
    """
    asked = json.loads(json.dumps({k: v for k, v in options.items() if k not in FREE}))
    file = output / "options.json"
    if options["resume"]:
        found = resume.last(output, launch.world(options))
        before = json.loads(file.read_text())
        changed = [f"{k}={asked[k]} (was {before.get(k)})" for k in asked if asked[k] != before.get(k)]
        if changed:
            raise ValueError(f"{output} was made with other options: {', '.join(changed)}")
        return found
    if any(output.glob("checkpoint-*")):
        raise ValueError(f"output={output} holds checkpoints: resume=true goes on from them, or name another")
    if os.environ.get("RANK", "0") == "0":
        output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asked, indent=1) + "\n")
        if not launch.launched():  # one that is: others may have begun to write it
            (output / fit.BROKEN).unlink(missing_ok=True)
    return None


def _train(
    options: dict[str, Any],
    merging: tuple[MergeConfig, ...],
    model: Any,
    processor: Any,
    rows: Any,
    arguments: Any,
    checkpoint: Path | None,
) -> None:
    """The run itself, behind everything that can be refused."""
    import card
    import curves
    import measured
    import torch
    from clock import Clock
    from data import Collate
    from memory import Memory
    from trainer import MergingTrainer

    model.print_trainable_parameters()
    trainer = MergingTrainer(
        model,
        arguments,
        Collate(processor),
        rows,
        processing_class=processor,
        merging=merging,
        base=fit.named(options["model"]),
        distill=options["distill_weight"] if options["distill"] else 0.0,
        words=rows.words,
    )
    clock, memory = Clock(), Memory(torch.cuda.is_available())
    trainer.add_callback(clock)
    started = time.perf_counter()
    done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    trainer.finish()
    if not trainer.is_world_process_zero():
        return
    output = Path(options["output"])
    curves.draw(trainer.state.log_history, output / "loss.png")
    facts = _facts(options, merging, rows, trainer) | {
        "seconds": seconds,
        "step_seconds": statistics.median(clock.seconds) if clock.seconds else None,
        "loss": done.training_loss,
        "bytes_before": memory.before,
        "bytes_most": memory.most(),
    }
    card.write(output, facts)
    if options["evaluate"]:
        log.info("evaluating before and after")
        del trainer, model  # what is evaluated is loaded anew
        gc.collect()
        torch.cuda.empty_cache()
        card.write(output, facts | {"accuracy": measured.accuracy(options, merging)})
    print(f"written to {output}")


def _facts(options: dict[str, Any], merging: tuple[MergeConfig, ...], rows: Any, trainer: Any) -> dict:
    """What a card says of a run, but for what it took and won."""
    from llava_pitome.bench.machine import machine

    return {
        "model": options["model"],
        "data": settings.described(options),
        "rows": len(rows),
        "broken": len(rows.broken),
        "merging": [config.to_dict() for config in merging],
        "options": options,
        "steps": trainer.state.global_step,
        "batch": options["batch_size"] * options["accumulate"] * trainer.args.world_size,
        "log": trainer.state.log_history,
        "machine": machine(),
        "accuracy": [],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
