"""The Hugging Face Trainer for a LLaVA that merges: how far is drawn every step, and it may teach itself.

Shapes: B rows, T tokens, A tokens of answers in the whole batch, V words of the vocabulary.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from llava_pitome import MergeConfig, apply, remove
from llava_pitome.models import adapters
from llava_pitome.models import hf_llava as llava
from train.encoding import IGNORED
from train.expand import expand
from train.memory import Memory
from train.stops import Diverged

PLAIN = MergeConfig(ratio=1.0)


class MergingTrainer(Trainer):
    """A Trainer whose batches hold one token a picture, see `data.Collate`."""

    def __init__(
        self,
        *args: Any,
        merging: Sequence[MergeConfig],
        base: str,
        distill: float,
        lengths: Sequence[int],
        **kwargs: Any,
    ):
        """Takes a model with adapters, see `lora.wrap`.

        Args:
            *args: as for Trainer.
            merging: what the steps choose from; an adapter is loaded with the first.
            base: the model that adapters belong to, as `load` takes it.
            distill: weight of the unmerged model's answers beside the data's; 0 asks it nothing.
            lengths: of each row, for train_sampling_strategy="group_by_length".
            **kwargs: as for Trainer.
        """
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self._configs, self._base = tuple(merging), base
        self._distill, self._lengths = distill, lengths
        self._parts = llava.find(self.model)
        self._applied: MergeConfig | None = None
        self._taught: Tensor | None = None  # (A, V) log-probabilities
        self.memory: Memory | None = None
        self._began = 0.0

    def config_at(self, step: int) -> MergeConfig:
        """How step `step` merges: the same for every process, and for a run that goes on."""
        return random.Random(f"{self.args.seed} {step}").choice(self._configs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One pass, forwards and backwards.

        Raises:
            Diverged: its loss is no number; nothing that learns has taken it up yet.
        """
        if self.memory is None:  # everything is in its place now
            self.memory = Memory(self.args.device.type == "cuda")
            self._began = time.perf_counter() - seconds(self.state.log_history)
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: try a lower lr= (it was "
                f"{self.args.learning_rate:g}), or dtype=float32"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the seconds that training has taken until now, earlier processes' included."""
        super().log(logs | {"seconds": round(time.perf_counter() - self._began, 3)}, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a step, merged as its number says."""
        if self._distill:
            self._taught = self._teach(inputs)
        config = self.config_at(self.state.global_step)
        self._merge(config)
        return super().compute_loss(model, self._expanded(inputs, config), return_outputs, num_items_in_batch)

    @torch.no_grad()
    def _teach(self, inputs: dict[str, Any]) -> Tensor:
        """What the model that was started from says without merging: log-probabilities (A, V).

        The same weights, without adapters and hooks; in front of the student's pass, so that whatever layers
        remember for their backward is the student's.
        """
        self._merge(None)
        batch = self._expanded(inputs, PLAIN)
        labels = batch.pop("labels")
        with self.model.disable_adapter():
            return F.log_softmax(at_answers(self.model(**batch).logits, labels)[0], -1)

    def _merge(self, config: MergeConfig | None) -> None:
        """Makes the model merge so, or not at all."""
        if config == self._applied:
            return
        if config is None:
            remove(self.model)
        else:
            apply(self.model, config, kernels=False)
        self._applied = config

    def _expanded(self, inputs: dict[str, Any], config: MergeConfig) -> dict[str, Any]:
        """A batch with as many placeholders as arrive."""
        parts, tokenizer = self._parts, self.processing_class.tokenizer
        tokens = config.tokens_at(parts.patches, parts.feature) + parts.front
        longer = expand(inputs, self.processing_class.image_token_id, tokens, tokenizer.pad_token_id)
        return longer | {"use_cache": False}

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy with the answers, and divergence from the teacher, a token of the whole step."""
        logits, said = at_answers(outputs.logits, labels)
        total = F.cross_entropy(logits, said, reduction="sum")
        if self._taught is not None:
            apart = F.kl_div(F.log_softmax(logits, -1), self._taught, reduction="sum", log_target=True)
            total = total + self._distill * apart
            self._taught = None
        count = len(said) if num_items_in_batch is None else num_items_in_batch
        return total / max(count, 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, and beside it how it is to merge and with which model."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            adapters.save_merge_config(Path(output_dir or self.args.output_dir), self._base, self._configs[0])

    def finish(self) -> None:
        """Takes the hooks off and writes the adapter."""
        self._merge(None)
        self.save_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As Trainer's, with lengths that are known without reading a picture."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return Grouped(self._lengths, size, self.args.seed, lambda: self.state.epoch or 0)


class Grouped(Sampler):
    """Rows of like length after each other, in an order that the seed and the epoch alone decide.

    Trainer's own order comes from torch's global state, which is another in a run that goes on, and in every
    process.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int, epoch: Callable[[], float]):
        """Takes the rows' lengths, rows a step, and what tells the epoch when one begins."""
        self._lengths, self._size, self._seed, self._epoch = list(lengths), size, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """The rows of an epoch."""
        epoch = int(self._epoch() + 1e-6)
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return iter(LengthGroupedSampler(self._size, lengths=self._lengths, generator=draw))


def seconds(log: Sequence[dict[str, float]]) -> float:
    """How long training had taken when it last logged."""
    return log[-1]["seconds"] if log else 0.0


def at_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What is predicted for every token with a label, (A, V) in float32, and these tokens (A,).

    Args:
        logits: (B, T, V), each of the token behind it.
        labels: (B, T).
    """
    asked = labels[:, 1:] != IGNORED
    return logits[:, :-1][asked].float(), labels[:, 1:][asked]
