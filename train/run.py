"""Fine-tunes a LLaVA while its tokens are merged: python train/run.py key=value ...

Adapters on the language model (and the tower), the projector whole; the keys are in settings.py, and said by
help. With zero= or processes= the command starts itself again under torchrun; deepspeed, torchrun and
accelerate launch may start it too.
"""

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.options import parse, usage
from train import fit, launch, lora, resume, settings
from train.settings import OPTIONS
from train.stops import Diverged, TooManyBroken

log = logging.getLogger("train")


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
        checkpoint = resume.start(output, options, launch.world(options))
    except ValueError as error:
        return _failed(error)
    facts = resume.done(output) if options["resume"] else None
    if facts is None:
        if not launch.launched() and (options["zero"] or options["processes"] > 1):
            launch.again(__file__, words, options["processes"])
        try:
            trainer = _prepared(options, merging, records, folder)
        except ValueError as error:
            return _failed(error)
        try:
            facts = _trained(trainer, options, merging, checkpoint)
        except (TooManyBroken, Diverged) as error:
            return _failed(_explained(error, trainer))
        del trainer  # what is evaluated is loaded anew
    return _told(facts, options, merging) if os.environ.get("RANK", "0") == "0" else 0


def _failed(error: Exception | str) -> int:
    print(f"train: {error}", file=sys.stderr)
    return 2


def _prepared(options: dict[str, Any], merging: tuple[MergeConfig, ...], records: Any, folder: Path) -> Any:
    """What trains.

    Raises:
        ValueError: the model, its projections or the rows do not allow it.
    """
    output = Path(options["output"])
    arguments = fit.arguments(options, output)  # first: ZeRO-3 divides weights as they are read
    model, processor = fit.model(options, merging, arguments)
    model = lora.wrap(model, options)
    resume.note(output, options)
    rows = fit.rows(options, merging, records, folder, processor, model, arguments)
    from train.data import Collate
    from train.trainer import MergingTrainer

    return MergingTrainer(
        model,
        arguments,
        Collate(processor),
        rows,
        processing_class=processor,
        merging=merging,
        base=fit.named(options["model"]),
        distill=(options["distill_weight"] or 1.0) if options["distill"] else 0.0,
        lengths=rows.lengths,
    )


def _trained(
    trainer: Any, options: dict[str, Any], merging: tuple[MergeConfig, ...], checkpoint: Path | None
) -> dict[str, Any]:
    """Trains and writes the adapter; what is to be told of it.

    Raises:
        TooManyBroken: rows turned out to be broken on the way.
        Diverged: the loss is no number any more.
    """
    from train import card

    trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.finish()
    return card.facts(options, merging, trainer)


def _explained(error: TooManyBroken | Diverged, trainer: Any) -> Exception:
    """An error on the way, and how a run goes on after it."""
    if isinstance(error, TooManyBroken):
        try:
            trainer.train_dataset.broken.check()
        except TooManyBroken as told:  # the same, without the traceback of a process that loads
            error = told
    if not any(Path(trainer.args.output_dir).glob("checkpoint-*")) or isinstance(error, Diverged):
        return error
    return TooManyBroken(f"{error}. With a higher skip_broken=, resume=true goes on from the last checkpoint")


def _told(facts: dict[str, Any], options: dict[str, Any], merging: tuple[MergeConfig, ...]) -> int:
    """Writes what is told of a run, measured accuracy included; returns the exit status."""
    from train import card, curves

    output = Path(options["output"])
    curves.draw(facts["log"], output / "loss.png")
    card.write(output, facts)
    if options["evaluate"]:
        import torch

        from train import measured

        log.info("evaluating before and after")
        gc.collect()  # what has trained holds on to itself
        torch.cuda.empty_cache()
        try:
            card.write(output, facts | {"accuracy": measured.accuracy(options, merging)})
        except measured.NotMeasured as error:
            return _failed(f"the adapter is in {output}; resume=true evaluate=true measures again: {error}")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
