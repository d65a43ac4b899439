"""Processors of models that take videos, on machines without torchvision.

transformers prepares videos with torchvision alone, and without it cannot even load the processors of models
that take them. Here frames are prepared by Pillow, with the settings that were saved for videos. Shapes:
F frames.
"""

import importlib
import inspect
from typing import Any

import transformers
from transformers import AutoTokenizer, BatchFeature, CLIPImageProcessorPil
from transformers.models.auto.image_processing_auto import (
    AutoImageProcessor,
)  # 5.17's own name needs torchvision
from transformers.processing_utils import VideosKwargs
from transformers.utils import PushToHubMixin, is_torchvision_available
from transformers.video_utils import make_batched_videos

from llava_pitome.saved_config import hub_file, read_dict

PROCESSORS = {  # by model type: the processor, and the video processor that it takes with torchvision
    "llava_next_video": ("LlavaNextVideoProcessor", "LlavaNextVideoVideoProcessor"),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionVideoProcessor"),
}
SETTINGS = (
    "do_convert_rgb", "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
FILES = ("video_preprocessor_config.json", "preprocessor_config.json")  # with settings; the first that exists
TENSORS = "return_tensors"


class PilVideoProcessor(PushToHubMixin):
    """Prepares the frames of videos with Pillow, as the video processors of transformers do with torchvision.

    The two round differently where frames are resized: by at most 2 of 256 grey levels, in less than 1 % of
    the pixels. Frames are not sampled: a video is given as the frames
    that the model is to see, as `video_io.read_video` returns them.

    Every one of SETTINGS is an attribute.

    Attributes:
        kind: name of the video processor of transformers whose settings these are.
    """

    model_input_names = ("pixel_values_videos",)
    valid_kwargs = VideosKwargs
    _auto_class = None

    def __init__(self, kind: str, settings: dict[str, Any]):
        """Takes saved settings; those that are missing are the defaults of `kind`.

        Args:
            kind: name of a video processor of transformers in PROCESSORS.
            settings: as saved, with others among them.

        Raises:
            ValueError: the settings sample frames.
        """
        model_type = next(name for name, (_, video) in PROCESSORS.items() if video == kind)
        file = f"transformers.models.{model_type}.video_processing_{model_type}"
        defaults = getattr(importlib.import_module(file), kind)
        values = {name: getattr(defaults, name, None) for name in SETTINGS}
        _check_sampling(settings)
        values |= {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
        self.kind = kind
        for name, value in values.items():
            setattr(self, name, value)

    def __call__(self, videos: Any, **options: Any) -> BatchFeature:
        """`pixel_values_videos`: for each video its frames (F, 3, H, W).

        Args:
            videos: one or several; each a list of images, or an array (F, H, W, 3) or (F, 3, H, W).
            **options: return_tensors, or values of SETTINGS for this call.

        Raises:
            ValueError: a video without frames, a path or URL, or an option that is not supported.
        """
        _check_sampling(options)
        tensors, given = options.pop(TENSORS, None), {k: v for k, v in options.items() if v is not None}
        unknown = [name for name in given if name not in (*SETTINGS, "input_data_format", "do_sample_frames")]
        if unknown:
            raise ValueError(
                f"{unknown[0]}={given[unknown[0]]!r} is not supported for videos without torchvision; "
                f"allowed are {TENSORS}, input_data_format, {', '.join(SETTINGS)}"
            )
        given.pop("do_sample_frames", None)
        flags = {name: bool(value) for name, value in self.settings.items() if name.startswith("do_")}
        of_frames = CLIPImageProcessorPil(**self.settings | flags)
        batch = [
            of_frames(list(video), return_tensors="pt", **given)["pixel_values"] for video in _videos(videos)
        ]
        return BatchFeature({self.model_input_names[0]: batch}, tensor_type=tensors)

    @property
    def settings(self) -> dict[str, Any]:
        """The values of SETTINGS."""
        return {name: getattr(self, name) for name in SETTINGS}

    def to_dict(self) -> dict[str, Any]:
        """The settings as transformers saves and loads them, also with torchvision."""
        return {"video_processor_type": self.kind, "do_sample_frames": False, **self.settings}


def load_processor(path: str, model_type: str, **hub: Any) -> Any:
    """The processor of a checkpoint, as AutoProcessor loads it, also where torchvision is not installed.

    Args:
        path: a folder or a hub id.
        model_type: of the model's config.
        **hub: revision, token, cache_dir, ...
    """
    if model_type not in PROCESSORS or is_torchvision_available():
        return transformers.AutoProcessor.from_pretrained(path, **hub)
    name, video = PROCESSORS[model_type]
    kind = getattr(transformers, name)
    saved = kind.get_processor_dict(path, **hub)[0]
    accepted = inspect.signature(kind.__init__).parameters.keys() - {"self", "kwargs"}
    return make_processor(
        kind,
        **{k: v for k, v in saved.items() if k in accepted}
        | {
            "image_processor": AutoImageProcessor.from_pretrained(path, **hub),
            "tokenizer": AutoTokenizer.from_pretrained(path, **hub),
            "video_processor": PilVideoProcessor(video, _saved_settings(path, saved, hub)),
        },
    )


def make_processor(kind: type, **parts: Any) -> Any:
    """A processor of a class of transformers, with a PilVideoProcessor among its arguments.

    Raises:
        TypeError: an image processor or a tokenizer of a wrong class.
    """
    processor = kind.__new__(kind)

    def check(name: str, part: Any) -> None:  # of transformers, which looks for torchvision's classes
        if not isinstance(part, PilVideoProcessor):
            kind.check_argument_for_proper_class(processor, name, part)

    processor.check_argument_for_proper_class = check
    try:
        processor.__init__(**parts)
    finally:
        del processor.check_argument_for_proper_class
    return processor


def _saved_settings(path: str, saved: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """The saved settings for videos, or else those for images, as transformers chooses them."""
    if isinstance(saved.get("video_processor"), dict):
        return saved["video_processor"]
    files = (hub_file(path, name, **hub) for name in FILES)
    return next((read_dict(file) for file in files if file is not None), {})


def _check_sampling(settings: dict[str, Any]) -> None:
    """Raises ValueError for settings that sample frames."""
    asked = [name for name in ("do_sample_frames", "fps", "num_frames") if settings.get(name)]
    if asked:
        raise ValueError(
            f"{asked[0]}={settings[asked[0]]!r} is not supported without torchvision: give the frames that "
            "the model is to see, as llava_pitome.video_io.read_video returns them"
        )


def _videos(videos: Any) -> list[Any]:
    """Videos as arrays of frames.

    Raises:
        ValueError: one has no frames, or is a path or URL.
    """
    if isinstance(videos, list | tuple) and any(isinstance(v, list | tuple) and not v for v in videos):
        raise ValueError("a video has 0 frames; at least 1 is needed")
    found = make_batched_videos(videos) if len(videos) else []
    for video in found:
        if isinstance(video, str):
            raise ValueError(f"a video is {video!r}; read it with llava_pitome.video_io.read_video first")
        if not len(video):
            raise ValueError("a video has 0 frames; at least 1 is needed")
    if not found:
        raise ValueError("a video has 0 frames; at least 1 is needed")
    return found
