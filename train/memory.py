"""The most memory that training holds at one time: of the GPU, or of this process."""

import resource
import sys
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK = "5"  # what makes Linux forget a process' peak


class Memory:
    """Counts from when it is made.

    Attributes:
        before: bytes that were held then, weights above all.
    """

    def __init__(self, cuda: bool):
        """Forgets what was held earlier, as while the model was loaded.

        Args:
            cuda: whether the GPU's memory counts, as torch allocates it.
        """
        self._cuda = cuda
        if cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if sys.platform == "linux":
                RESET.write_text(PEAK)
            self.before = self.most()

    def most(self) -> int:
        """Bytes held at most since then; where the system is not Linux, since the process began."""
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        if sys.platform == "linux":
            (line,) = (row for row in STATUS.read_text().splitlines() if row.startswith("VmHWM:"))
            return 1024 * int(line.split()[1])
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
