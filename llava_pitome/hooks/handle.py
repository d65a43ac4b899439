"""All places of one model together: what `apply` puts on it and `remove` takes off."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from llava_pitome.config import MergeConfig
from llava_pitome.hooks.image_features import ImageFeatures
from llava_pitome.hooks.input_resize import InputResizeHook
from llava_pitome.hooks.language_model import LanguageModelHooks
from llava_pitome.hooks.merge_step import MergeRecord
from llava_pitome.hooks.projector import ProjectorHooks
from llava_pitome.hooks.vision_tower import VisionTowerHooks
from llava_pitome.merge.plan import MergePlan
from llava_pitome.models.language_model_parts import LanguageModelParts
from llava_pitome.models.parts import ModelParts

Place = InputResizeHook | ProjectorHooks | VisionTowerHooks | ImageFeatures | LanguageModelHooks


class MergeHandle:
    """The hooks on a model.

    Attributes:
        config: how it merges.
        kernels: which kernels may compute, as given to `apply`.
        tower: merging inside the vision tower.
        prefix: merging behind the projector; None where none is asked for.
        decoder: merging in the language model; None where none is asked for.
    """

    def __init__(
        self, parts: ModelParts, config: MergeConfig, kernels: bool | str, llm: LanguageModelParts | None
    ):
        """Prepares hooks.

        Args:
            parts: of the model.
            config: how to merge.
            kernels: as for `apply`.
            llm: the language model's parts, where the config merges or weighs something inside it.
        """
        self.config, self.kernels = config, kernels
        triton = kernels == "triton"
        self.tower = VisionTowerHooks(
            parts.blocks, parts.feature, parts.class_tokens, config, kernels, parts.sdpa
        )
        self.shrinking: InputResizeHook | None = None
        self.prefix: ProjectorHooks | None = None
        self.arrivals: ImageFeatures | None = None
        self.decoder: LanguageModelHooks | None = None
        if config.resize is not None:
            self.shrinking = InputResizeHook(parts.tower, parts.patch_size, config.resize)
        if config.merges_in_prefix:
            self.prefix = ProjectorHooks(parts.whole.projector, self.tower, parts.front, config, triton)
        if llm is not None:
            self.arrivals = ImageFeatures(parts.whole.projector, parts.front, self.sizes, self.plans)
            self.decoder = LanguageModelHooks(llm, config, self.arrivals, self.patches, triton)

    @property
    def _parts(self) -> list[Place]:
        places = (self.shrinking, self.prefix, self.tower, self.arrivals, self.decoder)
        return [place for place in places if place is not None]

    def install(self) -> None:
        """Registers all hooks."""
        for part in self._parts:
            part.install()

    def remove(self) -> None:
        """Takes every hook off and forgets the last forward pass."""
        for part in self._parts:
            part.remove()

    def plans(self) -> list[MergePlan]:
        """The merges of the last forward pass from patches to what reached the language model, in order.

        See `merging.trace`. What the language model merged is in `decoder.slots`.
        """
        return self.tower.plans() + (self.prefix.plans() if self.prefix is not None else [])

    def watch(self, show: Callable[[str, int, MergeRecord], None] | None) -> None:
        """Has every merge from now on shown: its place, its layer (0 at the prefix), and what it did.

        None ends it. Watching changes nothing; under torch.compile it is not supported.

        Raises:
            RuntimeError: somebody else is watching.
        """
        if show is not None and self.tower.merger.watch is not None:
            raise RuntimeError("these merges are being watched already; end that first")
        watched = {"tower": (self.tower, len(self.tower.blocks)), "prefix": (self.prefix, 0)}
        if self.decoder is not None:
            watched["decoder"] = (self.decoder, len(self.decoder.llm.blocks))
        for place, (part, layers) in watched.items():
            if part is not None:
                part.merger.watch = None if show is None else partial(_shown, show, place, layers)

    def sizes(self) -> Tensor | None:
        """Patches (I, n) of each token that reached the language model; None where nothing merged."""
        slot = self.prefix.slot if self.prefix is not None else self.tower.slots[-1]
        return slot.size if slot is not None and self.plans() else None

    def patches(self) -> int:
        """Patches of each picture that the tower was last given; 0 before there was one."""
        return self.tower.patches


def _shown(
    show: Callable[[str, int, MergeRecord], None], place: str, layers: int, sight: MergeRecord
) -> None:
    """Tells a merge's layer by its depth l_i / l."""
    show(place, round(sight.depth * layers), sight)


def installed(model: nn.Module) -> list[Place]:
    """The hooks that are on a model, by place; a copy of a merging model carries a copy of them."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            owner = getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)
            if isinstance(owner, Place):
                found[id(owner)] = owner
    return list(found.values())
