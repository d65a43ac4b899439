"""LLaVA-1.5 checkpoints of the original package, converted to the Hugging Face class without that package."""

from llava_pitome.models.conversion.config import convert_config, is_original, read_raw_config
from llava_pitome.models.conversion.model import load

__all__ = ["convert_config", "is_original", "load", "read_raw_config"]
