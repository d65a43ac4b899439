"""MergeHandle: all hooks of one model together, as `apply` returns them and `remove` takes them off."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.image_features import ImageFeatures
from llava_pitome.hooks.input_resize import resize_images
from llava_pitome.hooks.language_model import LanguageModelHooks
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.hooks.projector import ProjectorHooks, feature_keys
from llava_pitome.hooks.vision_tower import VisionTowerHooks
from llava_pitome.merge.plan import MergePlan
from llava_pitome.models.parts import LanguageModelParts, ModelParts

Hooks = VisionTowerHooks | ProjectorHooks | LanguageModelHooks


class MergeHandle:
    """The hooks on a model.

    Attributes:
        config: how it merges.
        kernels: which kernels may compute, as given to `apply`.
        tower: the hooks on the vision tower.
        projector: the hooks on the projector; None where nothing needs them.
        language_model: the hooks on the language model; None where nothing changes there.
    """

    def __init__(
        self, parts: ModelParts, config: MergeConfig, kernels: bool | str, llm: LanguageModelParts | None
    ):
        """Prepares the hooks.

        Args:
            parts: of the model.
            config: how to merge.
            kernels: as for `apply`.
            llm: the language model's parts, where the config changes something inside it.
        """
        self.config, self.kernels = config, kernels
        triton = kernels == "triton"
        self.projector: ProjectorHooks | None = None
        self.language_model: LanguageModelHooks | None = None
        features = None if llm is None else ImageFeatures(parts.num_feature_prefix_tokens)
        feeds_projector = config.merges_in_prefix or features is not None
        self.tower = VisionTowerHooks(parts, config, kernels, feature_keys(config), feeds_projector)
        if feeds_projector:
            self.projector = ProjectorHooks(
                parts.llava.projector, self.tower, parts.num_feature_prefix_tokens, config, triton, features
            )
        if llm is not None:
            self.language_model = LanguageModelHooks(llm, config, features, self.patches, triton)

    @property
    def _hooks(self) -> list[Hooks]:
        return [hooks for hooks in (self.tower, self.projector, self.language_model) if hooks is not None]

    def install(self, parts: ModelParts) -> None:
        """Registers all hooks; where one cannot be registered, none is left.

        Args:
            parts: as given before; the model itself is not kept, so that it can be freed while it merges.
        """
        with ExitStack() as undo:
            undo.callback(self.remove)
            self.tower.install(parts.tower)
            if self.projector is not None:
                self.projector.install()
            if self.language_model is not None:
                self.language_model.install(parts.llava.multimodal)
            undo.pop_all()

    def remove(self) -> None:
        """Removes every hook, and drops the last forward pass."""
        for hooks in self._hooks:
            hooks.remove()

    def plans(self) -> list[MergePlan]:
        """The merges of the last forward pass from patches to what reached the language model, in order.

        See `merge.plan.trace`. What the language model merged is in `language_model.tokens`.
        """
        tower = [] if self.tower.last is None else self.tower.last.plans()
        return tower + (self.projector.plans() if self.projector is not None else [])

    def record(self, callback: Callable[[MergeRecord], None] | None) -> None:
        """Calls `callback` with every merge from now on; None ends it.

        Recording changes nothing; under torch.compile it is not supported.

        Raises:
            RuntimeError: another callback is being called.
        """
        if callback is not None and self.tower.step.record is not None:
            raise RuntimeError("merges are being recorded already; end that first with record(None)")
        for hooks in self._hooks:
            hooks.step.record = callback

    def resized(self, pixels: Tensor) -> Tensor:
        """Images (I, 3, H, W) at the size at which the tower sees them."""
        if self.config.resize is None:
            return pixels
        return resize_images(pixels, self.config.resize, self.tower.patch_size)

    def sizes(self) -> Tensor | None:
        """Patches (I, n) of each token that reached the language model; None where nothing merged."""
        if not self.plans():
            return None
        tokens = self.tower.last.tokens[-1]
        if self.projector is not None and self.projector.tokens is not None:
            tokens = self.projector.tokens
        return tokens.patch_sizes

    def patches(self) -> int:
        """Patches of each image that the tower was last given; 0 before there was one."""
        return 0 if self.tower.last is None else self.tower.last.patches


def installed(model: nn.Module) -> list[Hooks]:
    """The hooks that are on a model; a copy of a merging model carries a copy of them."""
    found: dict[int, Hooks] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)
            if isinstance(owner, Hooks):
                found[id(owner)] = owner
    return list(found.values())
