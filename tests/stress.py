"""Random work in threads on several merging models: every answer is the one that was given alone.

`scripts/stress.sh 600` runs it for ten minutes; tests/test_stress.py for a few seconds.
"""

import copy
import pickle
import random
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))
from conftest import SIDE, make_model, make_processor
from prompts import PROMPTS, RECIPES, batch, single

from llava_pitome import MergeConfig, apply, merge_tokens, remove
from llava_pitome.api import applied

THREADS = 4
CONFIGS = [
    *RECIPES, MergeConfig.recipe("best", tokens=6), MergeConfig(method="fastv", decoder={0: 5}),
    MergeConfig(ratio=0.9, decoder={1: 0.5}, positions="original", llm_proportional=True),
]  # fmt: skip
WORDS = torch.tensor([[5, 9]])


class Stop(Exception):
    """Raised inside a forward pass."""


failing = threading.local()  # the module at which a thread's pass is to stop


def maybe_stop(module, *_):
    """A forward hook of every module."""
    if getattr(failing, "module", None) is module:
        raise Stop


class Work:
    """Models that merge in different ways, inputs for them, and what they answer alone."""

    def __init__(self, seed: int):
        """Computes the answers."""
        from test_tower import state

        self.random, self.state = random.Random(seed), state
        self.done: Counter[str] = Counter()
        configs = self.random.sample(CONFIGS, 3)
        self.configs = [*configs, configs[0]]
        self.models = [make_model(seed=i % 3) for i in range(4)]
        pictures, processor = _pictures(seed), make_processor()
        plain = [
            single(processor, PROMPTS[0], pictures), single(processor, PROMPTS[1], pictures[1:]),
            batch(processor, PROMPTS[:3], pictures),
        ]  # fmt: skip
        self.dense_inputs = plain
        self.dense = [[self._ask(model, inputs) for inputs in plain] for model in self.models]
        self.before = [state(model) for model in self.models]
        self.inputs, self.expected, self.gradients, self.turns = [], [], [], []
        for model, config in zip(self.models, self.configs):
            with merge_tokens(model, config, processor):
                inputs = [
                    single(processor, PROMPTS[0], pictures), single(processor, PROMPTS[1], pictures[1:]),
                    batch(processor, PROMPTS[:3], pictures), batch(processor, PROMPTS[1:], pictures[::-1]),
                    single(processor, PROMPTS[3], pictures),
                ]  # fmt: skip
                self.inputs.append(inputs)
                self.expected.append([self._ask(model, x) for x in inputs])
                self.gradients.append([self._gradient(model, x) for x in inputs])
                self.turns.append([self._two_turns(model, x) for x in inputs[:2]])
            apply(model, config)
        for model in self.models:
            for module in model.modules():
                module.register_forward_hook(maybe_stop)

    def _ask(self, model, inputs):
        with torch.no_grad():
            return model(**inputs).logits

    def _gradient(self, model, inputs):
        weight = model.get_input_embeddings().weight
        return torch.autograd.grad(model(**inputs, labels=inputs["input_ids"]).loss, weight)[0]

    def _two_turns(self, model, inputs, change=None):
        with torch.no_grad():
            cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
            if change is not None:
                cache = change(cache)
            return model(input_ids=WORDS, past_key_values=cache).logits

    def ask(self, i, n):
        """A model's answer."""
        return torch.equal(self._ask(self.models[i], self.inputs[i][n]), self.expected[i][n])

    def train(self, i, n):
        """A model's gradient, with other passes before the backward pass."""
        return torch.equal(self._gradient(self.models[i], self.inputs[i][n]), self.gradients[i][n])

    def go_on(self, i, n):
        """A second turn on a cache, which may have been copied."""
        change = random.choice([None, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
        found = self._two_turns(self.models[i], self.inputs[i][n % 2], change)
        return torch.equal(found, self.turns[i][n % 2])

    def stop(self, i, n):
        """A pass that an exception ends at a random module, and one after it."""
        failing.module = random.choice(list(self.models[i].modules()))
        try:
            self._ask(self.models[i], self.inputs[i][n])
        except Stop:
            pass
        finally:
            failing.module = None
        return self.ask(i, n)

    def copy(self, i, n):
        """A copy, which merges, merges otherwise inside a block, and stops merging."""
        other = copy.deepcopy(self.models[i])
        if not torch.equal(self._ask(other, self.inputs[i][n]), self.expected[i][n]):
            return False
        try:
            with merge_tokens(other, random.choice(CONFIGS)):
                raise Stop
        except Stop:
            pass
        same = applied(other) == self.configs[i]
        same = same and torch.equal(self._ask(other, self.inputs[i][n]), self.expected[i][n])
        remove(other)
        return same and torch.equal(self._ask(other, self.dense_inputs[n % 3]), self.dense[i][n % 3])

    def one(self, seed):
        """One random piece of work; its name where it went wrong."""
        choice = random.Random(seed)
        work = choice.choices([self.ask, self.train, self.go_on, self.stop, self.copy], [8, 3, 4, 3, 1])[0]
        i, n = choice.randrange(len(self.models)), choice.randrange(5)
        self.done[work.__name__] += 1
        return None if work(i, n) else f"{work.__name__} of input {n} by {self.configs[i]}"

    def end(self):
        """Removes merging; what is not as it was before."""
        for model in self.models:
            for module in model.modules():
                for key in [k for k, hook in module._forward_hooks.items() if hook is maybe_stop]:
                    module._forward_hooks.pop(key)
            remove(model)
        wrong = [i for i, model in enumerate(self.models) if self.state(model) != self.before[i]]
        for i, model in enumerate(self.models):
            for inputs, expected in zip(self.dense_inputs, self.dense[i]):
                if not torch.equal(self._ask(model, inputs), expected):
                    wrong.append(i)
        return [f"model {i} after remove" for i in wrong]


def _pictures(seed):
    from PIL import Image

    values = torch.randint(0, 255, (4, 6, 6, 3), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return [Image.fromarray(x.numpy()).resize((SIDE, SIDE)) for x in values]


def run(seconds: float, seed: int = 0) -> tuple[list[str], Counter[str]]:
    """Works for some seconds; what went wrong, and how often each kind of work was done."""
    wrong: list[str] = []
    done: Counter[str] = Counter()
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(THREADS) as pool:
        while time.monotonic() < end and not wrong:
            work = Work(seed)
            started = time.monotonic()
            while time.monotonic() < min(end, started + 15) and not wrong:
                seeds = [work.random.randrange(2**32) for _ in range(8 * THREADS)]
                wrong += [found for found in pool.map(work.one, seeds) if found]
            wrong += work.end()
            done += work.done
            seed += 1
    return wrong, done


if __name__ == "__main__":
    torch.set_num_threads(1)
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    wrong, done = run(seconds, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{sum(done.values())} pieces of work in {seconds:g} s: {dict(done)}")
    print("\n".join(wrong) or "all as alone")
    sys.exit(bool(wrong))
