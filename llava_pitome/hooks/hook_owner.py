"""The objects whose methods are hooks on a model, and finding and removing these hooks, also on copies.

A hook owner holds what never changes while merging is applied: the config, numbers, callbacks. It holds no
module and nothing of a forward pass. So a copy of a module (copy.deepcopy, peft's modules_to_save, replicas
of DataParallel) can share it, and merges as the module that was copied.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from llava_pitome.hooks.current_pass import enter_attention

# torch's dicts of hooks by id, and those that say more about the hooks in them. They are private, but torch
# has no other way to find the hooks of a copy; those of the model itself are removed by torch's own handles.
HOOKS = ("_forward_pre_hooks", "_forward_hooks")
SETTINGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class HookOwner:
    """The base of objects whose bound methods are registered as hooks.

    Attributes:
        handle: the MergeHandle that it belongs to.
    """

    handle: Any = None

    def __copy__(self) -> "HookOwner":
        """Itself: copies of a module share the owners of its hooks."""
        return self

    def __deepcopy__(self, _memo: dict) -> "HookOwner":
        """As for `__copy__`."""
        return self


def owner_of(hook: Any) -> HookOwner | None:
    """The owner of a hook; None for hooks that are not of this package."""
    owner = getattr(hook.func if isinstance(hook, partial) else hook, "__self__", None)
    return owner if isinstance(owner, HookOwner) else None


def remove_hooks(root: nn.Module) -> None:
    """Removes all hooks of this package from a module and its submodules."""
    for module, key, hook in list(_hooks(root)):
        if hook is enter_attention or owner_of(hook) is not None:
            for name in (*HOOKS, *SETTINGS):
                getattr(module, name, {}).pop(key, None)


def _hooks(root: nn.Module) -> Iterator[tuple[nn.Module, int, Any]]:
    for module in root.modules():
        for name in HOOKS:
            for key, hook in getattr(module, name, {}).items():
                yield module, key, hook
