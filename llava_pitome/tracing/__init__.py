"""Which patch of an image went into which token, recorded merge by merge while a model runs.

`record_merges` records a model that runs anyway, `trace_image` and `trace_video` run it once.
"""

from llava_pitome.tracing.images import ImageTrace, as_image, trace_image, trace_video
from llava_pitome.tracing.recorder import MergeRecorder, record_merges
from llava_pitome.tracing.states import MergeTrace, PatchState, TracedMerge

__all__ = [
    "ImageTrace",
    "MergeRecorder",
    "MergeTrace",
    "PatchState",
    "TracedMerge",
    "as_image",
    "record_merges",
    "trace_image",
    "trace_video",
]
