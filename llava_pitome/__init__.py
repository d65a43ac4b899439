"""llava_pitome: LLaVA with its visual tokens merged by PiToMe."""

from llava_pitome.api import apply, load, merge_tokens, remove
from llava_pitome.config import MergeConfig
from llava_pitome.merge.spectral import spectral_distance
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import parents

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "MergeConfig",
    "apply",
    "load",
    "merge_tokens",
    "parents",
    "remove",
    "spectral_distance",
]
