"""Evaluates a merged LLaVA beside the unmerged one: python eval/run.py key=value ...

Everything is checked before anything is loaded. Answers are cached as they come, so that the same command
goes on where it was stopped.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from llava_pitome.config import RECIPES, MergeConfig
from llava_pitome.llava import DTYPES, QUANTIZATIONS
from llava_pitome.methods import METHODS
from llava_pitome.options import Option, boolean, listed, one_of, parse, shares, usage, whole

OPTIONS = {
    "ratio": Option(
        None,
        shares,
        "a number in (0, 1], or one per layer with commas",
        "share each layer keeps; 0.9 without tokens",
    ),
    "tokens": Option(
        None, whole(1), "a whole number from 1", "image tokens at the language model, instead of ratio"
    ),
    "recipe": Option("paper", one_of(*RECIPES), " | ".join(RECIPES), "how to merge"),
    "method": Option(None, one_of(*METHODS), " | ".join(METHODS), "who joins whom, instead of the recipe's"),
    "model": Option("auto", str, "auto | embedded | a hub id | a folder", "what to evaluate"),
    "tasks": Option(("vqav2_val",), listed, "names of lmms-eval tasks, with commas", "what to ask"),
    "data": Option(
        "auto", str, "auto | hub | embedded | a folder in VQAv2's form", "where the questions are"
    ),
    "batch_size": Option(16, whole(1), "a whole number from 1", "questions at a time"),
    "limit": Option(None, whole(1), "a whole number from 1", "ask only the first so many"),
    "processes": Option(1, whole(1), "a whole number from 1", "processes, one a GPU"),
    "dtype": Option("auto", one_of(*DTYPES), " | ".join(DTYPES), "of the weights; auto: as saved"),
    "quantization": Option(None, one_of(*QUANTIZATIONS), " | ".join(QUANTIZATIONS), "of the language model"),
    "attention": Option("sdpa", one_of("sdpa", "eager"), "sdpa | eager", "attention kernel"),
    "output": Option("output", str, "a folder", "where results go"),
    "baseline": Option(True, boolean, "true | false", "evaluate the unmerged model too"),
    "blank": Option(
        False, boolean, "true | false", "show grey pictures, to see what the questions alone give away"
    ),
    "dry_run": Option(False, boolean, "true | false", "say what would run, and stop"),
}


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if {"help", "--help", "-h"} & set(words):
        print(f"{__doc__}\nKeys:\n{usage(OPTIONS)}")
        return 0
    try:
        options = parse(words, OPTIONS)
        if options["ratio"] is None and options["tokens"] is None:
            options["ratio"] = 0.9
        merging = config(options)
        if options["model"] == "embedded":  # read by the hub's library when it is imported
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from plan import Plan  # the heavy libraries, once the words are known to be good

        plan = Plan.make(options, merging)
    except ValueError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    if options["processes"] > 1 and "TORCHELASTIC_RUN_ID" not in os.environ and not options["dry_run"]:
        return _spread(words, options["processes"])
    if os.environ.get("RANK", "0") == "0":
        print(plan.announcement, flush=True)
    if options["dry_run"]:
        print(plan.describe())
        return 0
    from evaluate import run

    return run(plan)


def config(options: dict) -> MergeConfig:
    """The merge config that the options ask for.

    Raises:
        ValueError: values that do not go together.
    """
    fields = {k: options[k] for k in ("ratio", "tokens", "method") if options[k] is not None}
    return MergeConfig.recipe(options["recipe"], **fields)


def _spread(words: list[str], processes: int) -> int:
    """Runs the same command in several processes, which share the questions out."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run([*command, __file__, *words], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
