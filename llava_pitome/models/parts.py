"""The modules of a model that merging touches, under names that are the same for every model family."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from llava_pitome.models.tiling import Tiling

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # where they hold a layer
WRAPPED = "token_merging_"  # what precedes the name of an attention implementation that merging wraps


class BlockParts(NamedTuple):
    """The parts of one pre-norm transformer block, of a vision tower or a language model.

    Attributes:
        layer: the whole block, from hidden states (B, T, D) and an attention mask to hidden states.
        attention: its attention module.
        norm: the norm before the MLP.
        mlp: the MLP, without its residual.
    """

    layer: nn.Module
    attention: nn.Module
    norm: nn.Module
    mlp: nn.Module


class LlavaParts(NamedTuple):
    """The parts of a LLaVA around its vision tower's blocks.

    Attributes:
        tower: the vision tower, without any wrapper.
        feature_layer: index of the tower's hidden states that are the features; a list where those of
            several layers are joined.
        reads_first_token: whether the first token of the hidden states is among the features.
        projector: the module between tower and language model.
        llm: the language model without its head; None where it is not transformers'.
        multimodal: the module that is called with prompts and images; None as for `llm`.
        image_token: the id of the placeholder that a prompt holds once per image token; None where a prompt
            holds one mark per image, in whose place the model puts the projected features.
    """

    tower: nn.Module
    feature_layer: int | Sequence[int]
    reads_first_token: bool
    projector: nn.Module
    llm: nn.Module | None
    multimodal: nn.Module | None
    image_token: int | None
    video_token: int | None = None
    tiling: Tiling | None = None
    pooling: nn.Module | None = None


class ModelParts(NamedTuple):
    """The parts of a model that merging needs.

    Attributes:
        model: the model without wrappers.
        tower: the vision tower, which may be the model itself.
        blocks: every encoder block of the tower, in order.
        feature_layers: number of blocks before each of the hidden states that are joined as features.
        num_prefix_tokens: tokens before the patches in the tower, 0 or 1 (the class token).
        num_feature_prefix_tokens: those of them that are among an image's features.
        patch_size: side of a patch in pixels.
        patches: patches of an image at the tower's own size.
        passes_kwargs: whether the tower's attention modules pass keyword arguments to the attention function.
        llava: what is around the tower; None where it feeds no language model.
    """

    model: nn.Module
    tower: nn.Module
    blocks: tuple[BlockParts, ...]
    feature_layers: tuple[int, ...]
    num_prefix_tokens: int
    num_feature_prefix_tokens: int
    patch_size: int
    patches: int
    passes_kwargs: bool
    llava: LlavaParts | None
    other_towers: tuple["ModelParts", ...] = ()

    @property
    def num_feature_layers(self) -> int:
        """The number of blocks up to the feature layer, the last one where there are several."""
        return max(self.feature_layers)

    @property
    def num_inner_models(self) -> int:
        """Models inside this one that could merge alone: its vision tower, and a LLaVA without its head."""
        has_head = self.llava is not None and self.llava.multimodal is not self.model
        return (self.tower is not self.model) + has_head


class LanguageModelAdapter(Protocol):
    """What differs between families of language models; see `models.hf_language_model.LlamaLike`."""

    num_heads: tuple[int, int]
    tiling: Tiling | None

    def image_tokens(self, inputs: dict[str, Any]) -> list[list[int]]:
        """Tokens of each image, and of each video, in a call of a model that cuts images into tiles."""

    def tokens_per_image(self, inputs: dict[str, Any]) -> int | None:
        """Tokens of each image in a call of the multimodal module that encodes them itself."""

    def language_model(self, multimodal: nn.Module) -> nn.Module:
        """The language model in the module around it."""

    def projections(self, attention: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The query and key projections of an attention module."""

    def cached_keys(self, cache: Any, layer: int, count: int) -> Tensor:
        """The first keys of a layer in the KV cache."""

    def check_inputs(self, inputs: dict[str, Any]) -> None:
        """Raises ValueError for inputs with which tokens cannot merge."""


class LanguageModelParts(NamedTuple):
    """The parts of a language model in a LLaVA.

    Attributes:
        multimodal: the module around it, called with input_ids and pixel_values.
        model: the language model, called with inputs_embeds, attention_mask and a KV cache.
        blocks: its layers.
        norm: the norm after the last layer.
        rotary: from hidden states and position_ids (B or 1, T) to cosine and sine of the rotary embedding.
        image_token: the id of the image placeholder; None where prompts reach the model without ids, and
            images are recognised by their features.
        video_token: the id of the video placeholder; None where the model takes no videos.
        num_feature_prefix_tokens: tokens before each image's patches that never merge.
        adapter: what differs between families of language models.
    """

    multimodal: nn.Module
    model: nn.Module
    blocks: tuple[BlockParts, ...]
    norm: nn.Module
    rotary: nn.Module
    image_token: int | None
    video_token: int | None
    num_feature_prefix_tokens: int
    adapter: LanguageModelAdapter


def trained_copies(module: nn.Module) -> list[nn.Module]:
    """A module and its copies, where peft trains copies of it (modules_to_save)."""
    copies = getattr(module, "modules_to_save", None)
    return [module.original_module, *copies.values()] if isinstance(copies, nn.ModuleDict) else [module]


def without_wrapper(layer: nn.Module) -> nn.Module:
    """The layer inside torch.compile's, gradient checkpointing's or FSDP's wrapper, which hooks are to be on.

    transformers records the output of the layer itself.
    """
    while True:
        children = dict(layer.named_children())
        inner = next((children[name] for name in WRAPPERS if name in children), None)
        if inner is None:
            return layer
        layer = inner
