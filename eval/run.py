"""Evaluates a merged LLaVA beside the unmerged one: python eval/run.py key=value ...

Everything is checked before anything is loaded. Answers are cached as they come, so that the same command
goes on where it was stopped.
"""

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from eval import readers
from eval.helping import helped
from eval.sizes import stay_offline
from llava_pitome import embedded
from llava_pitome.cli.bench.timing import Workload
from llava_pitome.cli.options import Option, boolean, fields, listed, one_of, parse, shares, whole
from llava_pitome.config import RECIPES, MergeConfig, combined
from llava_pitome.config_validation import AMOUNTS
from llava_pitome.methods import METHODS
from llava_pitome.models import adapters
from llava_pitome.models.checkpoints import DTYPES, QUANTIZATIONS

if TYPE_CHECKING:
    from eval.plan import Plan

RATIO = 0.9  # where nothing says how far

OPTIONS = {
    "ratio": Option(
        None,
        shares,
        "a number in (0, 1], or one per layer with commas",
        f"share each tower layer keeps; {RATIO}, or what an adapter says, where nothing else says how far",
    ),
    "tokens": Option(
        None, whole(1), "a whole number from 1", "image tokens at the language model, instead of ratio"
    ),
    "prefix": Option(
        None, readers.amount, "a share (0.5) or a number of tokens (64)", "what stays behind the projector"
    ),
    "decoder": Option(
        None,
        readers.layers,
        "layer:share or layer:number with commas (8:0.5,16:64)",
        "what stays at layers of the LLM",
    ),
    "resize": Option(
        None, readers.sides, "rows x columns (9x10)", "patches to which pictures are shrunk beforehand"
    ),
    "recipe": Option("paper", one_of(*RECIPES), " | ".join(RECIPES), "how to merge"),
    "method": Option(None, one_of(*METHODS), " | ".join(METHODS), "who joins whom, instead of the recipe's"),
    "merging": Option(
        None,
        fields,
        "a JSON object of MergeConfig's fields",
        "further fields, instead of the recipe's",
    ),
    "model": Option(
        "auto", str, "auto | embedded | a hub id | a folder", "what to evaluate; a model or an adapter"
    ),
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
    "questions": Option(
        None, str, "a folder", "where the embedded questions are kept; output's cache where not given"
    ),
    "baseline": Option(True, boolean, "true | false", "evaluate the unmerged model too"),
    "blank": Option(
        False, boolean, "true | false", "show grey pictures, to see what the questions alone give away"
    ),
    "text": Option(
        Workload._field_defaults["text"],
        whole(0),
        "a whole number from 0",
        "tokens beside the image's, for a dry run's FLOPs",
    ),
    "dry_run": Option(False, boolean, "true | false", "say what would run, with its FLOPs, and stop"),
}


def main(words: list[str]) -> int:
    """Runs the command; returns its exit status."""
    if helped(words, __doc__, OPTIONS):
        return 0
    try:
        plan = planned(parse(words, OPTIONS))
    except ValueError as error:
        print(f"eval: {error}", file=sys.stderr)
        return 2
    if (
        plan.options["processes"] > 1
        and "TORCHELASTIC_RUN_ID" not in os.environ
        and not plan.options["dry_run"]
    ):
        return _spread(words, plan.options["processes"])
    if os.environ.get("RANK", "0") == "0":
        print(plan.announcement, flush=True)
    if plan.options["dry_run"]:
        print(plan.describe())
        return 0
    from eval.evaluate import run

    return run(plan)


def planned(options: dict) -> "Plan":
    """The plan that the options ask for.

    Raises:
        ValueError: values that do not go together, or do not fit the model.
    """
    if options["model"] == "embedded":  # read by the hub's library when it is imported
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    elif options["dry_run"]:
        stay_offline()
    merging = config(options)
    from eval.plan import Plan  # the heavy libraries, once the words are known to be good

    return Plan.make(options, merging)


def config(options: dict) -> MergeConfig:
    """The merge config that the options ask for.

    Raises:
        ValueError: values that do not go together.
    """
    changes = combined({k: options[k] for k in (*AMOUNTS, "method")}, options["merging"])
    if options["merging"] is None and not changes and options["recipe"] == "paper":
        own = None if options["model"] in ("auto", embedded.NAME) else adapters.merging(options["model"])
        return MergeConfig(ratio=RATIO) if own is None else MergeConfig.from_dict(own)
    if options["merging"] is None and not changes.keys() & set(AMOUNTS):
        changes["ratio"] = RATIO
    return MergeConfig.recipe(options["recipe"], **changes)


def _spread(words: list[str], processes: int) -> int:
    """Runs the same command in several processes, which share the questions out."""
    threads = max((os.cpu_count() or 1) // processes, 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    return subprocess.run([*command, __file__, *words], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
