"""The callback for the Trainer of transformers, and for TRL's, which extend it."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava_pitome.api import save_merge_config
from llava_pitome.models import hf_llava


class TokenMergingCallback(TrainerCallback):
    """Writes token_merging.json into every checkpoint, and when training ends into the output folder.

    As in `Trainer(model, ..., callbacks=[TokenMergingCallback()])`. The file says how the model merged when
    it was written; where it did not merge, `ratio=1.0`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks what `on_save` needs.

        Raises:
            UnsupportedModelError: no LLaVA is found in the Trainer's model.
            ValueError: a hyperparameter search, which does not tell callbacks its folders.
        """
        hf_llava.find(kwargs["model"])
        if state.is_hyper_param_search:
            raise ValueError("TokenMergingCallback cannot be used in Trainer.hyperparameter_search")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after a checkpoint is written."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        _write(args, kwargs["model"], folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called before `Trainer.save_model` writes weights into the output folder."""
        _write(args, kwargs["model"], Path(args.output_dir))


def _write(args: TrainingArguments, model: nn.Module, folder: Path) -> None:
    if args.should_save:  # one process, or one on each node
        save_merge_config(model, folder)
