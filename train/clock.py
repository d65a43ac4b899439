"""How long each step of a run takes."""

import time
from typing import Any

from transformers import TrainerCallback


class Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next: reading rows counts, the first step does not.

    Attributes:
        seconds: of every step behind the first of this process.
    """

    def __init__(self) -> None:
        """Starts with none."""
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now
