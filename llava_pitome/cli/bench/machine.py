"""What a measurement ran on: processor, GPU, versions."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("llava-pitome", "torch", "transformers")


def machine(device: str | None = None) -> dict[str, Any]:
    """What numbers were measured on: the processor, and the GPU where one computes (or is there at all)."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def packages() -> dict[str, str | None]:
    """Versions of what computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = []
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {capability}"
