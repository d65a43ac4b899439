"""What a measurement ran on: processor, GPU, and versions of packages."""

import os
import platform
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("llava-pitome", "torch", "transformers")


def machine(device: str | None = None) -> dict[str, Any]:
    """Returns processor, cores, torch's threads, device, and the GPU's name where the device is one.

    Args:
        device: "cpu" or "cuda"; None: cuda where torch finds one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # on Linux, platform has no more than the architecture
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":", 1)[1].strip() if models else name
    facts = {
        "processor": f"{name}, {torch.backends.cpu.get_cpu_capability()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def packages() -> dict[str, str | None]:
    """Returns the version of every package in PACKAGES; None where it is not installed."""
    return {name: next((d.version for d in distributions(name=name)), None) for name in PACKAGES}
