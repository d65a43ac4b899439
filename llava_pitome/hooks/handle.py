"""MergeHandle: all hooks of one model together, as `apply` returns them and `remove` takes them off."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.attention_capture import restore_attention
from llava_pitome.hooks.call_checks import CallChecks
from llava_pitome.hooks.current_pass import encoded, forget, kept, push_encoded
from llava_pitome.hooks.hook_owner import HookOwner, remove_hooks
from llava_pitome.hooks.image_features import probe
from llava_pitome.hooks.image_packing import ImagePacking, restore_methods
from llava_pitome.hooks.input_resize import resize_images
from llava_pitome.hooks.language_model import LanguageModelHooks
from llava_pitome.hooks.merge_step import MergeRecord, MergeStep
from llava_pitome.hooks.projector import ProjectorHooks, ProjectorPass, feature_keys
from llava_pitome.hooks.tower_state import TowerPass
from llava_pitome.hooks.vision_tower import VisionTowerHooks
from llava_pitome.merge.plan import MergePlan
from llava_pitome.models.parts import LanguageModelParts, ModelParts

HANDLE = "token_merging_handle"  # the attribute of a model and its vision tower that holds their handle


class MergeHandle(HookOwner):
    """The hooks on a model, and on its copies.

    What it says of the last forward pass is of this thread's, or, in a thread that ran none, of the last one
    of any thread.

    Attributes:
        config: how it merges.
        kernels: which kernels may compute, as given to `apply`.
        tower: the hooks on the vision tower.
        projector: the hooks on the projector; None where nothing needs them.
        packing: the merge after the projector of a model that cuts images into tiles; None for others.
        language_model: the hooks on the language model; None where nothing changes there.
        is_whole: whether the model is a LLaVA, and not a vision tower alone.
        model_class: the name of the model's class.
        num_inner_models: as of `models.parts.ModelParts`.
        processor: that was fitted to the model; None: none was.
        config_before: the merge config that the model's config held before, as a dict.
    """

    processor: Any = None
    config_before: dict[str, Any] | None = None

    def __init__(
        self, parts: ModelParts, config: MergeConfig, kernels: bool | str, llm: LanguageModelParts | None
    ):
        """Prepares the hooks.

        Args:
            parts: of the model, which are not kept, so that the model can be freed while it merges.
            config: how to merge.
            kernels: as for `apply`.
            llm: the language model's parts, where the config changes something inside it.
        """
        self.handle, self.config, self.kernels = self, config, kernels
        self.is_whole = parts.llava is not None
        self.model_class, self.num_inner_models = type(parts.model).__name__, parts.num_inner_models
        triton = kernels == "triton"
        self.projector: ProjectorHooks | None = None
        self.language_model: LanguageModelHooks | None = None
        tiling = None if parts.llava is None else parts.llava.tiling
        feeds_projector = config.merges_in_prefix or llm is not None or tiling is not None
        self.tower = VisionTowerHooks(
            self, parts, config, kernels, feature_keys(config, tiling is not None), feeds_projector
        )
        if feeds_projector:
            self.projector = ProjectorHooks(
                self, self.tower.num_layers, parts.num_feature_prefix_tokens, config, triton, llm is not None
            )
        if llm is not None:
            self.language_model = LanguageModelHooks(self, llm, config, self.projector, triton)
        self.packing: ImagePacking | None = None
        if tiling is not None:
            self.packing = ImagePacking(self, parts, config, triton, llm is not None)
        self._checks = CallChecks(self, parts, config) if self.is_whole else None
        self._removable: list[RemovableHandle] = []
        self._model: Callable[[], nn.Module | None] = _no_model

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without what holds for the original model alone."""
        return vars(self) | {"_removable": [], "_model": _no_model, "processor": None}

    @property
    def _hooks(self) -> list[VisionTowerHooks | ProjectorHooks | LanguageModelHooks]:
        return [hooks for hooks in (self.tower, self.projector, self.language_model) if hooks is not None]

    @property
    def _steps(self) -> list[MergeStep]:
        """What merges, in every place."""
        return [hooks.step for hooks in (*self._hooks, self.packing) if hooks is not None]

    def install(self, parts: ModelParts, llm: LanguageModelParts | None = None) -> None:
        """Registers all hooks on a model; where one cannot be registered, none is left.

        Args:
            parts: as given before.
            llm: as given before.
        """
        with ExitStack() as undo:
            undo.callback(self.remove, parts.model, parts.tower)
            self._model = weakref.ref(parts.model)
            setattr(parts.model, HANDLE, self)
            if self._checks is not None:
                self._checks.install(parts, self._removable)
            for copied in (parts, *parts.other_towers):
                setattr(copied.tower, HANDLE, self)
                self.tower.install(copied, self._removable)
            if self.packing is not None:
                self.packing.install(parts, self._removable)
            elif self.projector is not None:
                self.projector.install(parts.llava.projector, self._removable)
            if self.language_model is not None:
                self.language_model.install(llm, self._removable)
            undo.pop_all()

    @property
    def model(self) -> nn.Module | None:
        """The model that it was installed on, and not a copy of it; None where that is gone."""
        return self._model()

    def remove(self, model: nn.Module, tower: nn.Module) -> None:
        """Removes every hook from a model, or from a copy of one, and drops the last forward pass.

        Args:
            model: without wrappers.
            tower: its vision tower, which the original package may keep outside of its modules.
        """
        if self.model is model:
            for handle in self._removable:  # also those on modules that the model has lost since
                handle.remove()
            self._removable.clear()
        for root in (model, tower):
            remove_hooks(root)
            restore_attention(root)
            for module in root.modules():
                vars(module).pop(HANDLE, None)
                restore_methods(module)
        if self.model is model:
            for hooks in self._hooks:
                hooks.forget()
            forget(self)

    def plans(self) -> list[MergePlan]:
        """The merges of the last forward pass from patches to what reached the language model, in order.

        See `merge.plan.trace`. What the language model merged is in `language_model.tokens`.

        Raises:
            ValueError: the model cuts images into tiles.
        """
        self._check_single_tiles("plans")
        tower, projected = self._last()
        return projected.plans() if projected is not None else [] if tower is None else tower.plans()

    def _last(self) -> tuple[TowerPass | None, ProjectorPass | None]:
        """The last passes through tower and projector; None for a projector that was not reached since."""
        tower = kept("tower_pass", self)
        projected = None if self.projector is None else self.projector.last
        if tower is not None and projected is not None and projected.after is not tower:
            projected = None
        return self.tower.last, projected

    def record(self, callback: Callable[[MergeRecord], None] | None) -> None:
        """Calls `callback` with every merge from now on; None ends it.

        Recording changes nothing; under torch.compile it is not supported.

        Raises:
            RuntimeError: another callback is being called.
        """
        if callback is not None and self.tower.step.record is not None:
            raise RuntimeError("merges are being recorded already; end that first with record(None)")
        for step in self._steps:
            step.record = callback

    def resized(self, pixels: Tensor) -> Tensor:
        """Images (I, 3, H, W) at the size at which the tower sees them."""
        if self.config.resize is None:
            return pixels
        return resize_images(pixels, self.config.resize, self.tower.patch_size)

    def sizes(self) -> Tensor | None:
        """Patches (I, n) of each token that reached the language model; None where nothing merged.

        Raises:
            ValueError: the model cuts images into tiles.
        """
        self._check_single_tiles("sizes")
        tower, projected = self._last()
        if not self.plans():
            return None
        return (tower.tokens[-1] if projected is None else projected.tokens).patch_sizes

    def patches(self) -> int:
        """Patches of each image, or tile, that the tower was last given; 0 before there was one."""
        return 0 if self.tower.last is None else self.tower.last.patches

    def _check_single_tiles(self, name: str) -> None:
        if self.packing is not None:
            raise ValueError(
                f"{name} of a {self.model_class} are not defined: the tokens of its tiles are packed with "
                "newlines, and without padding. tracing.trace_image says which token each patch is in"
            )

    def recognise(self, features: Tensor) -> None:
        """Takes features (B, N, C) for those that the tower has just computed, as from another rank."""
        newest = next(iter(encoded(self)), None)
        if newest is not None:
            probes = probe(features.detach())  # of all channels
            push_encoded(self, newest._replace(probes=probes, first_channel=0), len(features))


def _no_model() -> None:
    """In place of a reference to a model that is not here."""


def handle_of(module: nn.Module) -> MergeHandle | None:
    """The handle of a model or vision tower, which may be a copy; None where it does not merge."""
    return vars(module).get(HANDLE)
