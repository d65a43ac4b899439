"""What a thread knows of the forward pass that it runs, for hooks that cannot be handed it.

Layers are handed the state of their forward pass as a keyword argument, also where gradient checkpointing
recomputes them in another thread. Hooks on modules that take no keyword arguments (norms, MLPs, rotary
embeddings) find it here, and so do the stages that follow each other in one thread: vision tower, projector,
language model. Every thread has its own, so that passes that run at the same time never meet.
"""

import threading
import weakref
from typing import Any

from torch import nn
from torch.compiler import is_compiling

STATE = "token_merging"  # the keyword argument that carries a forward pass's state to the layers
SLOTS = (
    "images",  # records of the images that were encoded last
    "tiles",  # the images that are encoded, of models that cut them into tiles
    "call",  # the last pass through the tower before a call that is given pixels, until its projector runs
    "prompt",  # where the images of a prompt are, until the language model takes it
    "uncached",  # the prompt of the last forward pass without a KV cache
    "tower_pass",  # what the last pass through each part merged, for MergeHandle.plans
    "projector_pass",
    "language_pass",
)

MOST_IMAGES = 256  # of which what a tower computed is kept for a projector


class _Known:
    """The forward pass that a thread runs, and what was kept with `keep`."""

    def __init__(self) -> None:
        """Starts outside of any; as attributes of the instance, on whose set torch.compile guards."""
        self.state: Any = None
        self.attention: Any = None  # the attention module that was entered last
        # owners, what their towers computed, and of how many images
        self.encoded: tuple[tuple[Any, Any, int], ...] = ()
        for slot in SLOTS:
            setattr(self, slot, None)


class _Thread(threading.local):
    """What each thread knows; an object of its own, since torch.compile loses attributes set on a local."""

    def __init__(self) -> None:
        """Starts outside of any forward pass."""
        self.known = _Known()


_thread = _Thread()


def enter_pass(state: Any) -> None:
    """Makes a forward pass's state the one that this thread's hooks find; None ends it.

    It is not kept alive here, since nothing ends a recomputation.
    """
    known = _thread.known
    known.state, known.attention = _reference(state), None


def enter_attention(module: nn.Module, _args: tuple, kwargs: dict) -> None:
    """A pre-hook for attention modules that keep their keyword arguments from the attention function."""
    known = _thread.known
    known.state, known.attention = _reference(kwargs.get(STATE)), module


def state_of_attention(module: nn.Module) -> Any:
    """The state of the forward pass that entered an attention module by `enter_attention`; None elsewhere."""
    return _referent(_thread.known.state) if _thread.known.attention is module else None


def current_pass(owner: Any) -> Any:
    """The state of the forward pass that this thread runs, if it belongs to `owner`; None otherwise."""
    state = _referent(_thread.known.state)
    return state if state is not None and state.owner is owner else None


def keep(slot: str, owner: Any, value: Any) -> None:
    """Keeps a value of this thread in one of SLOTS.

    Args:
        slot: what is kept there before is dropped.
        owner: the MergeHandle whose hooks read it.
        value: what is kept; None keeps nothing.
    """
    setattr(_thread.known, slot, None if value is None else (_reference(owner), value))


def kept(slot: str, owner: Any) -> Any:
    """What this thread keeps in a slot for `owner`; None where that is nothing."""
    found = getattr(_thread.known, slot)
    return found[1] if found is not None and _referent(found[0]) is owner else None


def push_encoded(owner: Any, value: Any, images: int) -> None:
    """Keeps what a tower computed for the projector; of several passes the last ones, up to MOST_IMAGES."""
    before = () if is_compiling() else _thread.known.encoded  # a graph would depend on those
    kept_images = images
    for n, (_, _, count) in enumerate(before):
        kept_images += count
        if kept_images > MOST_IMAGES:
            before = before[:n]
            break
    _thread.known.encoded = ((_reference(owner), value, images), *before)


def encoded(owner: Any) -> list[Any]:
    """What this thread's passes through the tower of `owner` computed, the last first."""
    return [value for other, value, _ in _thread.known.encoded if _referent(other) is owner]


def forget(owner: Any) -> None:
    """Drops all that this thread keeps for `owner`."""
    enter_pass(None)
    _thread.known.encoded = tuple(x for x in _thread.known.encoded if _referent(x[0]) is not owner)
    for slot in SLOTS:
        if kept(slot, owner) is not None:
            setattr(_thread.known, slot, None)


def _reference(state: Any) -> Any:
    """A weak reference; the state itself under torch.compile, which cannot trace references."""
    if state is None or is_compiling():
        return state
    return weakref.ref(state)


def _referent(reference: Any) -> Any:
    """What `_reference` was given, or None where it is gone."""
    return reference() if isinstance(reference, weakref.ref) else reference
