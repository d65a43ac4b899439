"""Fine-tunes a merging LLaVA: python -m train.run key=value ...

Trained are LoRA adapters on the language model (and the vision tower), and the projector in full. With
zero= or processes= the command launches itself with torchrun; deepspeed and accelerate launch work too.
"""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pitome import MergeConfig
from llava_pitome.cli.options import helped, parse
from train import checkpoint, data, launch, options
from train.rows import JsonRows, TooManyBrokenRows

log = logging.getLogger("train")


def main(words: Sequence[str]) -> int:
    """Trains; returns the command's exit status."""
    if helped(words, __doc__, options.OPTIONS):
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        given = parse(launch.without_local_rank(list(words)), options.OPTIONS)
        configs = options.check(given)
        launch.check(given)
        rows, folder = data.json_rows(given)
        start = checkpoint.find_start(Path(given["output"]), given, launch.world_size(given))
    except ValueError as error:
        return _fail(error)
    facts = checkpoint.read_result(Path(given["output"])) if given["resume"] else None
    if facts is None:
        if not launch.is_launched() and (given["zero"] or given["processes"] > 1):
            launch.relaunch(list(words), given["processes"])
        try:
            trainer = make_trainer(given, configs, rows, folder)
        except ValueError as error:
            return _fail(error)
        from train import model_card
        from train.trainer import NonFiniteLoss

        try:
            trainer.model.print_trainable_parameters()
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
            trainer.finish()
        except TooManyBrokenRows as error:
            return _fail(_with_resume_hint(error, trainer))
        except NonFiniteLoss as error:
            return _fail(error)
        facts = model_card.training_facts(given, configs, trainer)
        del trainer  # its memory; the evaluation loads the model anew
    return _report(facts, given, configs) if os.environ.get("RANK", "0") == "0" else 0


def _fail(error: Exception | str) -> int:
    print(f"train: {error}", file=sys.stderr)
    return 2


def make_trainer(given: dict[str, Any], configs: Sequence[MergeConfig], rows: JsonRows, folder: Path) -> Any:
    """The MergingTrainer of a run.

    Raises:
        ValueError: the model, its projections or the rows are not suitable.
    """
    from train import model
    from train.collator import Collator
    from train.trainer import MergingTrainer
    from train.training_args import training_arguments

    arguments = training_arguments(given)  # first: under ZeRO-3 the model is partitioned while it is loaded
    plain, processor = model.load_model(given, configs, arguments)
    adapted = model.add_adapters(plain, given)
    checkpoint.write_options(Path(given["output"]), given)
    dataset = data.make_dataset(given, configs, rows, folder, processor, adapted, arguments)
    return MergingTrainer(
        adapted,
        arguments,
        Collator(processor, dataset.grey_size),
        dataset,
        processing_class=processor,
        configs=configs,
        base_model=model.base_model_name(given["model"]),
        distill_weight=(given["distill_weight"] or 1.0) if given["distill"] else 0.0,
    )


def _with_resume_hint(error: TooManyBrokenRows, trainer: Any) -> TooManyBrokenRows:
    """The error without the traceback of a worker process; with a checkpoint, how the run can continue."""
    try:
        trainer.train_dataset.broken.check()
    except TooManyBrokenRows as own:
        error = own
    if not any(Path(trainer.args.output_dir).glob("checkpoint-*")):
        return error
    return TooManyBrokenRows(
        f"{error}. With a higher skip_broken=, resume=true goes on from the last checkpoint"
    )


def _report(facts: dict[str, Any], given: dict[str, Any], configs: Sequence[MergeConfig]) -> int:
    """Writes model card, numbers and plot, with accuracy if evaluate=true; returns the exit status."""
    from train import model_card

    output = Path(given["output"])
    model_card.write(output, facts)
    if given["evaluate"]:
        import torch

        from train.evaluation import EvaluationError, measure_accuracy

        log.info("evaluating before and after training")
        gc.collect()  # the Trainer is in reference cycles
        torch.cuda.empty_cache()
        try:
            model_card.write(output, facts | {"accuracy": measure_accuracy(given, configs)})
        except EvaluationError as error:
            return _fail(f"the adapter is in {output}; resume=true evaluate=true measures again: {error}")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
