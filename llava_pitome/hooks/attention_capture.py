"""What is seen of a block's attention while it runs, by hooks on its projections."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llava_pitome.hooks import attention_scores as scores
from llava_pitome.hooks.merge_step import key
from llava_pitome.merge.plan import log_size_bias
from llava_pitome.methods import METHODS
from llava_pitome.models.parts import BlockParts


def wanted(method: str, by_keys: bool) -> tuple[str, ...]:
    """What has to be kept of a block for a method: "key", one a token, and "attention", queries and keys."""
    attends = any(need.endswith("attention") for need in METHODS[method].needs)
    return ("key",) * by_keys + ("attention",) * attends


class AttentionCapture:
    """The hooks on one block's projections; they keep what is wanted of a pass in which `when` says so."""

    def __init__(
        self, block: BlockParts, wanted: tuple[str, ...], class_tokens: int, when: Callable[[], bool]
    ):
        """Prepares hooks.

        Args:
            block: where to look.
            wanted: as `wanted` names it.
            class_tokens: class tokens in front, whose attention is asked for; 0: that of all tokens.
            when: whether this pass matters.
        """
        self.block, self.wanted, self.class_tokens, self.when = block, wanted, class_tokens, when
        self.forget()

    def forget(self) -> None:
        """Drops what the last pass left."""
        self._key: Tensor | None = None
        self._queries: Tensor | None = None
        self._keys: Tensor | None = None

    def install(self) -> list[RemovableHandle]:
        """Registers the hooks that are needed; in front of any that change what a projection hands on."""
        handles = []
        if self.wanted:
            handles.append(self.block.keys.register_forward_hook(self._keep_keys))
        if "attention" in self.wanted:
            handles.append(self.block.queries.register_forward_hook(self._keep_queries))
        return handles

    def see(self, keys: Tensor) -> None:
        """Keeps keys (B, T, heads * C) as if the block had made them now."""
        if "key" in self.wanted:
            self._key = key(keys, self.block.key_heads)
        if "attention" in self.wanted:
            self._keys = keys

    def key(self) -> Tensor:
        """One key a token (B, T, C), once.

        Raises:
            RuntimeError: the block made none.
        """
        found, self._key = self._key, None
        return _there(found, "keys")

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Both projections as they were made.

        Raises:
            RuntimeError: the block made none.
        """
        return _there(self._queries, "queries"), _there(self._keys, "keys")

    def class_attention(self, sizes: Tensor | None) -> Tensor:
        """The class token's attention to the other tokens (B, N); without one, the mean over all tokens.

        Args:
            sizes: (B, T) by which attention was weighed, if it was.
        """
        queries, keys = self.queries_and_keys()
        mask = None if sizes is None else log_size_bias(sizes.to(keys.device), keys.dtype)
        heads = (self.block.heads, self.block.key_heads)
        if self.class_tokens:
            return scores.attention(queries[:, :1], keys, *heads, mask)[:, 0, self.class_tokens :]
        return scores.received(queries, keys, *heads, mask, None)

    def _keep_keys(self, module: nn.Module, _args: tuple, keys: Tensor) -> None:
        if self.when():
            self._check(module)
            self.see(keys)

    def _keep_queries(self, module: nn.Module, _args: tuple, queries: Tensor) -> None:
        if self.when():
            self._check(module)
            self._queries = queries

    def _check(self, module: nn.Module) -> None:
        """Raises RuntimeError where peft has put another projection around this one since `apply`."""
        if not any(child is module for child in self.block.attention.children()):
            raise RuntimeError(
                "a projection of a block that is to merge was wrapped after apply: what was added would not "
                "count in what merges; wrap first, or apply again"
            )


def _there(found: Tensor | None, what: str) -> Tensor:
    if found is None:
        raise RuntimeError(
            f"a block that is to merge made no {what}: its projection was replaced after apply; apply again"
        )
    return found
