"""llava_pitome: LLaVA with its visual tokens merged by PiToMe."""

from llava_pitome.api import applied, apply, load, merge_tokens, remove, save_merge_config
from llava_pitome.config import MergeConfig
from llava_pitome.hooks.handle import MergeHandle
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.merge.plan import MergePlan, trace, unmerge
from llava_pitome.merge.spectral import spectral_distance
from llava_pitome.methods import METHODS
from llava_pitome.methods.registry import Method, parents, register_method
from llava_pitome.models.hf_llava import UnsupportedModelError

__version__ = "0.2.0"
__all__ = [
    "METHODS",
    "MergeConfig",
    "MergeHandle",
    "MergePlan",
    "MergeRecord",
    "Method",
    "UnsupportedModelError",
    "applied",
    "apply",
    "load",
    "merge_tokens",
    "parents",
    "register_method",
    "remove",
    "save_merge_config",
    "spectral_distance",
    "trace",
    "unmerge",
]
