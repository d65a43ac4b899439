"""lmms-eval's questions as inputs of a model: images, the frames of videos, and what they cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from llava_pitome.config import MergeConfig
from llava_pitome.flops import closed_form_of_layouts, literature
from llava_pitome.image_io import is_changed_by_convert, open_image, to_rgb, with_detail_of
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import tokens_of_image
from llava_pitome.models import hf_llava as llava
from llava_pitome.video_io import read_video

VIDEOS = (".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's colour, where a processor has none


class Question(NamedTuple):
    """A prompt and what it is about.

    Attributes:
        prompt: with a placeholder for each image and video.
        images: in their order.
        videos: the frames of each.
    """

    prompt: str
    images: list[Image.Image]
    videos: list[list[Image.Image]]

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames of each video: only prompts that have the same can be one batch."""
        return tuple(map(len, self.videos))


class QuestionReader:
    """Makes questions and batches of them for one processor.

    Attributes:
        processor: of the model.
        frames: that are read of each video; None: videos are refused.
        blank: whether images and frames are replaced by grey ones.
        thumbnail_side: pixels of the square whose detail images are reduced to; None: they keep theirs.
    """

    def __init__(self, processor: Any, frames: int | None, blank: bool, thumbnail: bool):
        """Checks that the processor makes thumbnails, and takes videos, where that is wanted.

        Raises:
            ValueError: it does not.
        """
        self.processor, self.frames, self.blank = processor, frames, blank
        self.thumbnail_side = _thumbnail_side(processor) if thumbnail else None
        if frames is not None and getattr(processor, "video_processor", None) is None:
            raise ValueError(f"frames={frames} is not allowed: a {type(processor).__name__} takes no videos")
        mean = getattr(processor.image_processor, "image_mean", None) or MEAN
        self._grey = tuple(int(255 * value) for value in mean)  # all zeros after preprocessing

    def read(self, context: str, visuals: Sequence[Any], name: str) -> Question:
        """A question as lmms-eval gives it.

        Args:
            context: its text.
            visuals: images, paths of image files, or paths of videos. Where `frames` is given, several images
                are the frames of one video.
            name: of its images in error messages.

        Raises:
            ValueError: an image or video that cannot be read, a video where `frames` is not given, or another
                number of placeholders than of images or videos.
        """
        images: list[Image.Image] = []
        videos: list[list[Image.Image]] = []
        if self.frames is not None and len(visuals) > 1 and not any(map(_is_video, visuals)):
            kept = _evenly(len(visuals), self.frames)
            videos = [[self._image(visuals[i], name) for i in kept]]
            visuals = ()
        for visual in visuals:
            if not _is_video(visual):
                images.append(self._image(visual, name))
            elif self.frames is None:
                raise ValueError(f"{visual} is a video: give frames=, the number that is read of each")
            else:
                videos.append([self._changed(frame) for frame in read_video(visual, frames=self.frames)])
        return Question(self._prompt(context, len(images), len(videos)), images, videos)

    def inputs(self, questions: Sequence[Question]) -> Any:
        """The model's inputs for a batch of questions, on the CPU."""
        images = [question.images for question in questions]
        videos = [video for question in questions for video in question.videos]
        given = {"videos": videos} if videos else {}
        return self.processor(
            text=[question.prompt for question in questions],
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            **given,
        )

    def _image(self, visual: Any, name: str) -> Image.Image:
        is_file = isinstance(visual, str | os.PathLike)
        return self._changed(open_image(visual) if is_file else to_rgb(visual, name))

    def _changed(self, image: Image.Image) -> Image.Image:
        """The image as the options `blank` and `thumbnail` change it."""
        if self.blank:
            return Image.new("RGB", image.size, self._grey)
        return image if self.thumbnail_side is None else with_detail_of(image, self.thumbnail_side)

    def _prompt(self, context: str, images: int, videos: int) -> str:
        """The prompt of a question: placeholders come first unless the question has its own.

        Raises:
            ValueError: the question has another number of placeholders than of images or videos.
        """
        content = [{"type": "text", "text": context}]
        for kind, count in (("video", videos), ("image", images)):
            placeholder = getattr(self.processor, f"{kind}_token", None)
            if placeholder is None or placeholder not in context:
                content = [{"type": kind}] * count + content
            elif context.count(placeholder) != count:
                raise ValueError(
                    f"the question has {context.count(placeholder)} {placeholder} but comes with {count} "
                    f"{kind}s"
                )
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )


def sums(
    model: nn.Module, config: MergeConfig | None, questions: Sequence[Question], inputs: Any
) -> dict[str, float]:
    """What a batch of a model that cuts images into tiles costs, summed over its images and prompts.

    Empty for other models, whose images all have the same tokens.

    Args:
        model: that answers.
        config: how it merges; None: not at all.
        questions: of the batch.
        inputs: made of them.
    """
    parts = llava.find(model)
    if parts.llava.tiling is None:
        return {}
    config = MergeConfig(ratio=1.0) if config is None else config
    layers = parts.llava.llm.config.num_hidden_layers
    lengths = inputs["attention_mask"].sum(1).tolist()
    total = dict.fromkeys(("images", "prompts", "image_tokens", "llm_tokens", "prompt_tokens"), 0.0)
    total |= dict.fromkeys(("tower_gflops", "projector_gflops", "llm_gflops", "literature_gmacs"), 0.0)
    for layouts, length in zip(_layouts(parts, questions, inputs), lengths, strict=True):
        counts = [tokens_of_image(config, parts.num_feature_layers, layout) for layout in layouts]
        flops = closed_form_of_layouts(parts.model, layouts, length - sum(counts), config)
        total["images"] += len(counts)
        total["prompts"] += 1
        total["image_tokens"] += sum(counts)
        total["llm_tokens"] += sum(sum(config.llm_lengths(n, layers)[:-1]) for n in counts) / layers
        total["prompt_tokens"] += length
        total["literature_gmacs"] += literature(parts.model, length) / 1e9
        for part, n in flops._asdict().items():
            total[f"{part}_gflops"] += n / 1e9
    return total


def _layouts(parts: Any, questions: Sequence[Question], inputs: Any) -> list[list[ImageLayout]]:
    """The layouts of the images and videos of each question."""
    tiling = parts.llava.tiling
    sizes = inputs.get("image_sizes")
    found = iter(() if sizes is None else tiling.images(sizes, inputs.get("batch_num_images")))
    return [
        [next(found) for _ in question.images] + [tiling.video(frames) for frames in question.frames]
        for question in questions
    ]


def as_rgb(value: Any, name: str) -> Any:
    """A task's document, in which images are RGB where the task's own `convert("RGB")` would lose something.

    Other images stay as they are: tasks read some of them as numbers, such as masks.

    Args:
        value: a document, or a part of one.
        name: of its images in error messages.
    """
    if isinstance(value, dict):
        return {k: as_rgb(v, name) for k, v in value.items()}
    if isinstance(value, list):
        return [as_rgb(v, name) for v in value]
    return to_rgb(value, name) if isinstance(value, Image.Image) and is_changed_by_convert(value) else value


def _is_video(visual: Any) -> bool:
    return isinstance(visual, str | os.PathLike) and Path(visual).suffix.lower() in VIDEOS


def _evenly(total: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices of `total`, first and last included; of one, the middle."""
    if total <= count:
        return list(range(total))
    return [total // 2] if count == 1 else [i * (total - 1) // (count - 1) for i in range(count)]


def _thumbnail_side(processor: Any) -> int:
    """The side of the thumbnail that a processor makes of every image, in pixels.

    Raises:
        ValueError: it makes none.
    """
    images = processor.image_processor
    if not hasattr(images, "image_grid_pinpoints"):
        raise ValueError(f"thumbnail=True is not allowed: a {type(images).__name__} makes no thumbnails")
    size = images.size
    return size["shortest_edge"] if size.get("shortest_edge") else size["height"]
