"""Merging after the projector in models that cut images into tiles, around the model's own packing.

Every patch is given its token's features again before the model packs them (unpad, pooling, newlines), so
that its code runs unchanged. Tokens are then taken from what was packed, merged to the exact budget, and put
in order with the newlines that stay.
Shapes: I images of one layout, T tiles of each, P packed tokens of an image without merging, A tokens before
a merge, M after it, D channels.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import needs_attention
from llava_pitome.hooks.current_pass import encoded, keep, kept
from llava_pitome.hooks.hook_owner import HookOwner
from llava_pitome.hooks.image_features import ImageRecord, record_packed
from llava_pitome.hooks.merge_step import MergePoint, MergeStep, TokenState
from llava_pitome.hooks.packed_tokens import (
    PackedTokens,
    Unit,
    joined,
    newline_positions,
    unit_tokens,
    units_of,
)
from llava_pitome.hooks.projector import DEPTH, uses_keys
from llava_pitome.hooks.temporal_merge import length_in_time, merge_neighbouring_frames
from llava_pitome.hooks.tile_call import TileCall
from llava_pitome.hooks.tile_shares import divide_by_attention
from llava_pitome.image_layout import ImageLayout
from llava_pitome.image_schedule import merges, resized, schedule
from llava_pitome.merge.plan import MergePlan, gather_tokens, trace
from llava_pitome.models.parts import ModelParts

METHODS = ("get_image_features", "get_video_features")  # of a model, which encode and pack


class MergedFeatures:
    """What stands in a model's place for one of METHODS, as an attribute of the instance."""

    def __init__(self, module: nn.Module, name: str, owner: "ImagePacking"):
        """Keeps the model, so that copies of it get one of their own."""
        self.module, self.name, self.owner = module, name, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encodes images or videos, merged."""
        return self.owner.features(self.module, self.name, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own, which `generate` reads."""
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))


class ImagePacking(HookOwner):
    """The merge after the projector of a model that cuts images into tiles.

    Attributes:
        handle: the MergeHandle that it belongs to.
        step: what merges.
        listener: None, or an object that is told what became of packed tokens, by their positions in the
            sequence that the model packs without merging. Its method `merged` is given those before a merge
            (B, A), those of the tokens that they merged into, and whether `step` recorded it; its method
            `packed`, at the end of a call, the layouts of the images as they were encoded and the positions
            (M,) of their tokens.
    """

    listener: Any = None

    def __init__(
        self, handle: Any, parts: ModelParts, config: MergeConfig, triton: bool, records_images: bool
    ):
        """Prepares the hooks.

        Args:
            handle: the MergeHandle that they belong to.
            parts: of the model.
            config: how to merge.
            triton: prefer kernels written in Triton.
            records_images: whether the language model needs to recognise the features.
        """
        self.handle, self.config, self.records_images = handle, config, records_images
        self.tiling, self.num_layers = parts.llava.tiling, parts.num_feature_layers
        self._image_token, self._video_token = parts.llava.image_token, parts.llava.video_token
        self.step = MergeStep(config, 0, triton)
        self._point = MergePoint("prefix", 0, DEPTH, config.method, config.parameters)

    def install(self, parts: ModelParts, handles: list[RemovableHandle]) -> None:
        """Sets the attributes, registers the hooks, and appends each hook to `handles`."""
        module = parts.llava.multimodal
        self._bind(module)
        handles.append(module.register_forward_pre_hook(self._before_call, with_kwargs=True))
        handles.append(parts.llava.projector.register_forward_hook(self._after_projector))
        if parts.llava.pooling is not None:
            handles.append(parts.llava.pooling.register_forward_pre_hook(self._before_pooling))

    def _bind(self, module: nn.Module) -> None:
        for name in METHODS:
            if hasattr(type(module), name):
                setattr(module, name, MergedFeatures(module, name, self))

    def _before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the multimodal module: replicas of DataParallel share their original's attributes.

        Raises:
            ValueError: a prompt holds an image and a video.
        """
        if vars(module)[METHODS[0]].module is not module:
            self._bind(module)
        ids = args[0] if args else kwargs.get("input_ids")
        encoded = kwargs.get("mm_encoder_outputs") or {}
        has_images = kwargs.get("pixel_values") is not None or encoded.get("image") is not None
        has_videos = kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None
        if ids is None or not (has_images and has_videos) or is_compiling():
            return
        has_both = (ids == self._image_token).any(-1) & (ids == self._video_token).any(-1)
        if bool(has_both.any()):
            rows = has_both.nonzero().flatten().tolist()
            raise ValueError(
                f"prompts {rows} hold images and videos, which cannot merge together; give each "
                "prompt images alone or videos alone"
            )

    def features(self, module: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
        """What the model's own method `name` returns, with merged tokens.

        Images are encoded in groups of one layout, whose tiles then merge by one schedule.

        Raises:
            ValueError: images and sizes do not fit each other, or a budget does not fit an image.
        """
        original = getattr(type(module), name)
        given = inspect.signature(original).bind(module, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        given.pop("self")
        is_video = name == METHODS[1]
        layouts = self._layouts(given, is_video)
        schedules = [schedule(self.config, layout, self.num_layers) for layout in layouts]
        wants_tuple = not given.pop("return_dict", getattr(module.config, "return_dict", True))
        groups: dict[ImageLayout, list[int]] = {}
        for i, layout in enumerate(layouts):
            groups.setdefault(layout, []).append(i)
        if not merges(self.config, is_video):
            out = self._encode(
                original, module, given, TileCall(layouts[0], layouts[0], schedules[0], len(layouts))
            )
            records = self._unmerged_records(out.pooler_output, layouts)
            positions = [torch.arange(layout.tokens, device="cpu") for layout in layouts]
        else:
            positions = [torch.empty(0, device="cpu")] * len(layouts)
            packed: list[Tensor] = [torch.empty(0, device="cpu")] * len(layouts)
            records = []
            for layout, images in groups.items():
                encoded_as = resized(self.config, layout)
                call = TileCall(layout, encoded_as, schedules[images[0]], len(images))
                part = given if len(groups) == 1 else self._part(given, layouts, images)
                out = self._encode(original, module, part, call)
                tokens = self._merged(call, out.pooler_output)
                for i, row, position in zip(images, tokens.x, tokens.position):
                    packed[i], positions[i] = row, position
                if self.records_images:
                    records.append(record_packed(tokens.x, tokens.sizes, tokens.position, encoded_as.tokens))
            if len(groups) > 1:
                out = type(out)()
            out.pooler_output = torch.stack(packed) if is_video else packed
        if self.records_images:
            self.handle.projector.add_records(records)
        if self.listener is not None:
            self.listener.packed([resized(self.config, layout) for layout in layouts], positions)
        return out.to_tuple() if wants_tuple else out

    def _layouts(self, given: dict[str, Any], is_video: bool) -> list[ImageLayout]:
        """The layouts of the images, or videos, of a call.

        Raises:
            ValueError: their pixels are not those of these layouts.
        """
        if is_video:
            pixels = given.get("pixel_values_videos")
            if pixels is None:  # the method's name for them before it packed newlines
                pixels = given["pixel_values"]
                if merges(self.config, True) or self.records_images:
                    raise ValueError(
                        "merging the tokens of videos needs a newer transformers, such as 5.23: this one "
                        "packs them outside of get_video_features"
                    )
            if pixels.ndim != 5:
                raise ValueError(
                    f"pixel_values_videos has shape {tuple(pixels.shape)}; it must be "
                    "(videos, frames, channels, height, width)"
                )
            layouts = [self.tiling.video(pixels.shape[1])] * len(pixels)
        else:
            pixels = given["pixel_values"]
            layouts = self.tiling.images(given["image_sizes"], given.get("batch_num_images"))
            self._check_tiles(pixels, layouts, given["image_sizes"])
        side = self.tiling.tile
        if tuple(pixels.shape[-2:]) != (side, side):
            raise ValueError(
                f"the pixels of a tile are {pixels.shape[-2]} x {pixels.shape[-1]}; this model's tiles are "
                f"{side} x {side}"
            )
        return layouts

    def _check_tiles(self, pixels: Any, layouts: Sequence[ImageLayout], sizes: Any) -> None:
        """Raises ValueError where pixels (I, T, C, H, W) or (tiles, C, H, W) are not those of the layouts."""
        if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
            raise ValueError(
                f"pixel_values has shape {tuple(getattr(pixels, 'shape', ()))}; it must be (images, tiles, "
                "channels, height, width) or (tiles, channels, height, width)"
            )
        needed = [layout.tiles for layout in layouts]
        if pixels.ndim == 4 and len(pixels) != sum(needed):
            raise ValueError(
                f"pixel_values holds {len(pixels)} tiles; image_sizes={_listed(sizes)} needs {sum(needed)}"
            )
        if pixels.ndim == 5 and (len(pixels) != len(needed) or pixels.shape[1] < max(needed)):
            raise ValueError(
                f"pixel_values holds {len(pixels)} images of {pixels.shape[1]} tiles; "
                f"image_sizes={_listed(sizes)} needs {len(needed)} of {max(needed)}"
            )

    def _part(
        self, given: dict[str, Any], layouts: Sequence[ImageLayout], images: Sequence[int]
    ) -> dict[str, Any]:
        """The arguments for some of the images of a call."""
        pixels = given["pixel_values"]
        if pixels.ndim == 4:
            by_image = pixels.split([layout.tiles for layout in layouts])
            pixels = torch.cat([by_image[i] for i in images])
        else:
            pixels = pixels[list(images)]
        sizes = given["image_sizes"]
        sizes = sizes[list(images)] if isinstance(sizes, Tensor) else [sizes[i] for i in images]
        part = given | {"pixel_values": pixels, "image_sizes": sizes}
        if part.get("batch_num_images") is not None:  # several single tiles, or each alone in its prompt
            is_single = layouts[images[0]].ends_with_newline
            part["batch_num_images"] = [len(images)] if is_single else [1] * len(images)
        return part

    def _encode(self, original: Any, module: nn.Module, given: dict[str, Any], call: TileCall) -> Any:
        """The model's own features of images of one layout; `call` is what the hooks find meanwhile."""
        keep("tiles", self.handle, call if merges(self.config, call.layout.is_video) else None)
        try:
            return original(module, **given, return_dict=True)
        finally:
            keep("tiles", self.handle, None)

    def _after_projector(self, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """Gives every patch its token's features (I * T, side * side, D), for the model to pack."""
        call: TileCall | None = kept("tiles", self.handle)
        if call is None or call.is_pooled:
            return output
        call.projected = output
        return self._unmerged(call, output)

    def _before_pooling(self, _module: nn.Module, args: tuple) -> tuple | None:
        """Before the pooling of a video's frames: gives every patch its token's features."""
        call: TileCall | None = kept("tiles", self.handle)
        if call is None:
            return None
        call.is_pooled = True
        return (self._unmerged(call, args[0]), *args[1:])

    def _unmerged(self, call: TileCall, x: Tensor) -> Tensor:
        plans = kept("tower_pass", self.handle).plans()
        return call.all_tiles(gather_tokens(x, trace(plans).to(x.device)) if plans else x)

    def _merged(self, call: TileCall, packed: Any) -> PackedTokens:
        """The tokens of a call's images that reach the language model, in order, newlines among them.

        Args:
            call: the images, encoded.
            packed: (P, D) of each image, as the model packed them.
        """
        packed = packed if isinstance(packed, Tensor) else torch.stack(list(packed))
        units = units_of(call, self.config)
        by_keys, with_attention = uses_keys(self.config), self._needs_attention
        found = encoded(self.handle)[0]
        tokens = unit_tokens(call, packed, found, units, by_keys, with_attention)
        merged = self._merge_units(call, units, tokens)
        newlines = newline_positions(call).to(packed.device).expand(call.images, -1)
        last = torch.full_like(newlines, packed.shape[1] - 1)  # a newline wherever there is one
        ends = PackedTokens(
            gather_tokens(packed, last), newlines, torch.ones(newlines.shape, device=packed.device)
        )
        return joined([*merged, ends]).in_order()

    @property
    def _needs_attention(self) -> bool:
        shares = self.config.tile_shares == "attention"
        return shares or needs_attention(self.config.method)

    def _merge_units(
        self, call: TileCall, units: Sequence[Unit], tokens: list[PackedTokens]
    ) -> list[PackedTokens]:
        """The tokens of each unit after the merge, by the config's division of the budget."""
        config = self.config
        is_joint = config.temporal if call.layout.is_video else config.tile_shares == "joint"
        if is_joint and len(units) > 1:
            together, total = joined(tokens), sum(unit.kept for unit in units)
            if not call.layout.is_video:
                return [self._merge(together, total, None)]
            videos = [self._merge_video(together.row(i), len(units), total) for i in range(call.images)]
            return [PackedTokens.stacked(videos)]
        if config.tile_shares == "attention" and len(units) > 1 and not call.layout.is_video:
            counts = divide_by_attention(call, encoded(self.handle)[0], units)
            rows = [
                joined([self._merge(unit.row(i), n, None) for unit, n in zip(tokens, counts[i])])
                for i in range(call.images)
            ]
            return [PackedTokens.stacked(rows)]
        merged: list[PackedTokens | None] = [None] * len(units)
        alike: dict[tuple[int, int, tuple[int, int]], list[int]] = {}
        for u, unit in enumerate(units):
            alike.setdefault((unit.count, unit.kept, unit.grid), []).append(u)
        for (_, count, grid), members in alike.items():  # units of the same counts as one batch
            batch = PackedTokens.stacked([tokens[u] for u in members])
            for u, part in zip(members, self._merge(batch, count, grid).split(len(members))):
                merged[u] = part
        return merged

    def _merge_video(self, tokens: PackedTokens, frames: int, total: int) -> PackedTokens:
        """Tokens of one video, merged first with the same place in neighbouring frames, then with any."""
        metric = tokens.x if tokens.metric is None else tokens.metric
        length = length_in_time(metric.detach(), frames, total)
        if length < metric.shape[1]:
            before = tokens
            tokens, plan = merge_neighbouring_frames(tokens, frames, length)
            self._report(before, tokens, plan, False)
        return self._merge(tokens, total, None)

    def _merge(self, tokens: PackedTokens, length: int, grid: tuple[int, int] | None) -> PackedTokens:
        """Tokens merged to `length`."""
        if length == tokens.x.shape[1]:
            return tokens
        metric = tokens.x if tokens.metric is None else tokens.metric
        inputs = {"class_attention": lambda: tokens.attention, "grid": partial(_known, grid)}
        x, state = self.step.merge(tokens.x, metric, length, TokenState(tokens.sizes), self._point, inputs)
        merged = PackedTokens(x, tokens.position.gather(1, state.merge.kept), state.sizes)
        self._report(tokens, merged, state.merge, True)
        return merged

    def _report(self, before: PackedTokens, after: PackedTokens, plan: MergePlan, record: bool) -> None:
        """Tells the listener of a merge; `record` says whether a MergeRecord of it was made."""
        if self.listener is not None:
            self.listener.merged(before.position, after.position.gather(1, plan.slot), record)

    def _unmerged_records(self, packed: Any, layouts: Sequence[ImageLayout]) -> list[ImageRecord]:
        """Records of images in which nothing merged."""
        if not self.records_images:
            return []
        return [
            record_packed(x.unsqueeze(0), None, None, layout.tokens) for x, layout in zip(packed, layouts)
        ]


def restore_methods(module: nn.Module) -> None:
    """Gives a module its own methods back, in whose place MergedFeatures stand."""
    for name in METHODS:
        if isinstance(vars(module).get(name), MergedFeatures):
            delattr(module, name)


def _known(grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        raise ValueError("the tokens are no grid of patches, which the method needs")
    return grid


def _listed(sizes: Any) -> list:
    return sizes.tolist() if hasattr(sizes, "tolist") else list(sizes)
