"""The most memory that training holds at one time: of the GPU, or of this process."""

import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK = "5"  # what makes Linux forget a process' peak


class Memory:
    """Counts from when it is made, or, where the system does not let it, from the start of the process.

    Attributes:
        before: bytes that were held then, weights above all.
    """

    def __init__(self, cuda: bool):
        """Forgets what was held earlier, as while the model was loaded.

        Args:
            cuda: whether the GPU's memory counts, as torch allocates it.
        """
        self._cuda = cuda
        self._status = sys.platform == "linux" and not cuda and _forget()
        if cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = self.most()

    def most(self) -> int:
        """Bytes held at most since then."""
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        if self._status:
            (line,) = (row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM:"))
            return 1024 * int(line.split()[1])
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most


def _forget() -> bool:
    """Whether the system has forgotten this process' peak; containers may forbid it."""
    try:
        RESET.write_text(PEAK)
    except OSError:
        return False
    return True
