"""Evaluates a merged LLaVA beside the unmerged one: python -m eval.run key=value ...

Everything is checked before anything is loaded. Answers are cached as they are generated, so the same command
resumes a run that was stopped.
"""

import os
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from eval.command import FIELDS, child_environment, count, run_command, switch
from llava_pitome import embedded
from llava_pitome.cli.options import Option, listed, merge_options, one_of
from llava_pitome.config import MergeConfig, combined
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.models import adapters
from llava_pitome.models.checkpoints import DTYPES, QUANTIZATIONS

if TYPE_CHECKING:
    from eval.evaluation.plan import EvaluationPlan

RATIO = 0.9  # where no option says how far to merge
TEXT_TOKENS = 60  # beside the image's, about a VQAv2 prompt's
OPTIONS = {
    "model": Option(
        "auto",
        str,
        "auto | embedded | embedded-next | a hub id | a folder",
        "what to evaluate; a model or an adapter",
    ),
    "tasks": Option(("vqav2_val",), listed, "names of lmms-eval tasks, with commas", "what to evaluate on"),
    "data": Option(
        "auto",
        str,
        "auto | hub | embedded | embedded-next | a folder in VQAv2's form",
        "source of the questions",
    ),
    "batch_size": count(16, "questions per batch"),
    "limit": count(None, "use only the first so many questions"),
    "processes": count(1, "processes, one per GPU"),
    "dtype": Option("auto", one_of(*DTYPES), " | ".join(DTYPES), "of the weights; auto: as saved"),
    "quantization": Option(None, one_of(*QUANTIZATIONS), " | ".join(QUANTIZATIONS), "of the language model"),
    "attention": Option("sdpa", one_of("sdpa", "eager"), "sdpa | eager", "attention kernel"),
    "output": Option("output", str, "a folder", "where results are written"),
    "questions": Option(
        None, str, "a folder", "where the embedded questions are stored; by default the cache in output"
    ),
    "baseline": switch(True, "evaluate the unmerged model too"),
    "blank": switch(False, "replace images by grey ones, to measure what the questions alone reveal"),
    "thumbnail": switch(False, "reduce images to the detail of their thumbnail, to measure what tiles add"),
    "frames": count(None, "frames that are read of each video, for tasks with videos"),
    "text": count(TEXT_TOKENS, "text tokens of a prompt, for a dry run's FLOPs", low=0),
    "dry_run": switch(False, "print what would run, with its FLOPs, and stop"),
    **merge_options(help={"ratio": f"; {RATIO}, or an adapter's own, where nothing else says how far"}),
}


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return run_command("eval", __doc__, OPTIONS, words, make_plan, partial(execute, words=words))


def make_plan(options: dict[str, Any]) -> "EvaluationPlan":
    """The evaluation that the options describe.

    Raises:
        ValueError: values that contradict each other, or do not fit the model.
    """
    if options["model"] in embedded.PATHS:  # read by huggingface_hub when it is imported
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    elif options["dry_run"]:
        from eval.evaluation.model_costs import set_offline_without_network

        set_offline_without_network()
    merging = merge_config(options)
    from eval.evaluation.plan import EvaluationPlan  # heavy imports, once the words are known to be good

    return EvaluationPlan.make(options, merging)


def merge_config(options: dict[str, Any]) -> MergeConfig:
    """The merge config that the options describe; an adapter's own where they say nothing.

    Raises:
        ValueError: values that contradict each other, or an adapter that does not say how it merged.
    """
    changes = combined({name: options[name] for name in FIELDS}, options["merging"])
    if options["merging"] is None and not changes and options["recipe"] == "paper":
        own = (
            None if options["model"] in ("auto", *embedded.PATHS) else adapters.merge_config(options["model"])
        )
        return own or MergeConfig(ratio=RATIO)
    if options["merging"] is None and not changes.keys() & set(AMOUNTS):
        changes["ratio"] = RATIO
    return MergeConfig.recipe(options["recipe"], **changes)


def execute(plan: "EvaluationPlan", words: list[str]) -> int:
    """Carries out a plan, in several processes where it asks for them; returns the exit status."""
    processes, dry_run = plan.options["processes"], plan.options["dry_run"]
    if processes > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and not dry_run:
        threads = max((os.cpu_count() or 1) // processes, 1)
        environment = child_environment({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))})
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *torchrun, "-m", "eval.run", *words]
        return subprocess.run(command, env=environment, check=False).returncode
    if os.environ.get("RANK", "0") == "0":
        print(plan.announcement, flush=True)
    if dry_run:
        print(plan.describe())
        return 0
    from eval.evaluation.lmms_eval_runner import evaluate

    evaluate(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
