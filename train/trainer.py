"""The Hugging Face Trainer for a merging LLaVA: a ratio is drawn for every step, distillation is optional.

Shapes: B rows, T tokens, A tokens of answers in the batch, V words of the vocabulary.
"""

import contextlib
import random
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
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
from train.collator import expand
from train.conversation import IGNORE_INDEX
from train.image_counts import UNMERGED, ImageCounts


class NonFiniteLoss(RuntimeError):
    """The loss is not a finite number."""


class MergingTrainer(Trainer):
    """A Trainer on batches with one placeholder per image, see `collator.Collator`."""

    def __init__(
        self,
        *args: Any,
        configs: Sequence[MergeConfig],
        base_model: str,
        distill_weight: float,
        **kwargs: Any,
    ):
        """Takes Trainer's arguments, for a peft model and a `data.ConversationDataset`.

        Args:
            *args: as for Trainer.
            configs: one is drawn for every step; the adapter is saved with the first.
            base_model: name of the model without adapters, as `load` takes it.
            distill_weight: of the divergence from the unmerged model's predictions; 0 skips these.
            **kwargs: as for Trainer.
        """
        super().__init__(*args, compute_loss_func=self._loss, **kwargs)
        self._configs, self._base_model, self._distill_weight = tuple(configs), base_model, distill_weight
        self._counts = ImageCounts.of(llava.find(self.model))
        self._applied: MergeConfig | None = None
        self._teacher: Tensor | None = None  # (A, V) log-probabilities
        self.memory: PeakMemory | None = None
        self._start = 0.0

    def config_at(self, step: int) -> MergeConfig:
        """The merge config of a step: the same in every process, and in a resumed run."""
        return random.Random(f"{self.args.seed} {step}").choice(self._configs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's.

        Raises:
            NonFiniteLoss: before the optimizer's step, so that weights are not affected.
        """
        if self.memory is None:  # model and optimizer are on their device now
            self.memory = PeakMemory(self.args.device.type == "cuda")
            log = self.state.log_history
            self._start = time.perf_counter() - (log[-1]["seconds"] if log else 0.0)
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}: try a lower lr= (it was "
                f"{self.args.learning_rate:g}), or dtype=float32"
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with the seconds of training, including those before the run was resumed."""
        super().log(logs | {"seconds": round(time.perf_counter() - self._start, 3)}, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss under the merge config of the step."""
        if self._distill_weight:
            self._teacher = self.teacher_log_probs(inputs)
        config = self.config_at(self.state.global_step)
        self.set_merging(config)
        return super().compute_loss(model, self.expand(inputs, config), return_outputs, num_items_in_batch)

    @torch.no_grad()
    def teacher_log_probs(self, inputs: dict[str, Any]) -> Tensor:
        """Log-probabilities (A, V) of the same weights without adapters and without merging.

        Computed before the student's pass, so that what layers keep for the backward pass is the student's.
        """
        self.set_merging(None)
        batch = self.expand(inputs, UNMERGED)
        labels = batch.pop("labels")
        with self.model.disable_adapter():
            return F.log_softmax(answer_logits(self.model(**batch).logits, labels)[0], -1)

    def set_merging(self, config: MergeConfig | None) -> None:
        """Applies a merge config to the model; None removes merging."""
        if config == self._applied:
            return
        if config is None:
            remove(self.model)
        else:
            apply(self.model, config, kernels=False)
        self._applied = config

    def expand(self, inputs: dict[str, Any], config: MergeConfig) -> dict[str, Any]:
        """The batch with as many placeholders as the config leaves tokens of each image."""
        processor, tokens = self.processing_class, self._counts.of_batch(config, inputs)
        expanded = expand(inputs, processor.image_token_id, tokens, processor.tokenizer.pad_token_id)
        return expanded | {"use_cache": False}

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Cross-entropy plus the weighted divergence from the teacher, averaged over the step's tokens."""
        logits, targets = answer_logits(outputs.logits, labels)
        total = F.cross_entropy(logits, targets, reduction="sum")
        if self._teacher is not None:
            divergence = F.kl_div(F.log_softmax(logits, -1), self._teacher, reduction="sum", log_target=True)
            total = total + self._distill_weight * divergence
            self._teacher = None
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        return total / max(count, 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, with its merge config and the name of its base model."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            folder = Path(output_dir or self.args.output_dir)
            adapters.save_base_model(folder, self._base_model)
            self._configs[0].save_pretrained(folder)

    def finish(self) -> None:
        """Removes merging and writes the adapter."""
        self.set_merging(None)
        self.save_model()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """As Trainer's, with lengths known without reading images."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return SeededLengthGroupedSampler(size, self.train_dataset.lengths, self.args.seed)


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Rows of similar length in the same batch, in an order that depends on seed and epoch alone.

    Trainer's own order depends on torch's global generator, which differs after resuming and among processes.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        """Takes rows per step, the lengths of the rows, and the seed."""
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator("cpu"))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of an epoch."""
        self.generator.manual_seed(self.seed * 1_000_003 + self.epoch)
        return super().__iter__()


class PeakMemory:
    """The most memory held at one time since this was made: by the GPU, or by this process.

    Where the system cannot reset the peak of a process, since it started.

    Attributes:
        before: bytes that were held when this was made, mostly weights.
    """

    def __init__(self, cuda: bool):
        """Resets the peak of the GPU (`cuda`), as torch allocates it, or of the process."""
        self._cuda = cuda
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # not Linux, or a container that forbids it
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
        self.before = torch.cuda.memory_allocated() if cuda else self.peak()

    def peak(self) -> int:
        """Bytes held at most since then."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists() and (match := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
            return 1024 * int(match[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def answer_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that predict tokens with a label, (A, V) in float32, and these tokens (A,).

    Args:
        logits: (B, T, V), each of the next token.
        labels: (B, T).
    """
    is_answer = labels[:, 1:] != IGNORE_INDEX
    return logits[:, :-1][is_answer].float(), labels[:, 1:][is_answer]
