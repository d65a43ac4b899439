"""How many tokens a config leaves in every place, known before any image is seen."""

import math

from llava_pitome import token_schedule as schedule


class Counts:
    """What follows for token counts from a MergeConfig's fields; see there."""

    ratio: float | tuple[float, ...] | None
    tokens: int | None
    depths: tuple[float, float]
    prefix: float | int | None
    prefix_share: float
    decoder: dict[int, float | int]
    llm_proportional: bool
    positions: str
    resize: tuple[int, int] | None

    @property
    def merges_in_tower(self) -> bool:
        """Whether the tower is asked to merge; how much depends on the image's size."""
        shares = self.ratio if isinstance(self.ratio, tuple) else (self.ratio or 1,)
        return self.prefix_share < 1 and (self.tokens is not None or any(share < 1 for share in shares))

    @property
    def merges_in_prefix(self) -> bool:
        """Whether tokens merge behind the projector."""
        divided = self.prefix_share > 0 and self.ratio != 1
        return divided or (self.prefix is not None and schedule.shortens(self.prefix))

    @property
    def reaches_llm(self) -> bool:
        """Whether anything changes inside the language model."""
        return bool(self.merging_layers) or self.llm_proportional or self.positions != "packed"

    @property
    def merging_layers(self) -> tuple[int, ...]:
        """The language model's layers that merge, in order."""
        return tuple(i for i, keep in self.decoder.items() if schedule.shortens(keep))

    def patches_at(self, patches: int) -> int:
        """Patches that the tower sees, of an image's `patches`.

        Raises:
            ValueError: `resize` asks for more than there are.
        """
        seen = patches if self.resize is None else self.resize[0] * self.resize[1]
        side = math.isqrt(patches)
        if self.resize is not None and (
            max(self.resize) > side if side * side == patches else seen > patches
        ):
            raise ValueError(f"resize={self.resize} does not fit: this image has {patches} patches")
        return seen

    def lengths(self, patches: int, layers: int) -> tuple[int, ...]:
        """Patches before the first and after each of the `layers` tower layers that may merge.

        Args:
            patches: what the tower sees.
            layers: up to the feature layer.

        Raises:
            ValueError: more tokens than patches, or not one ratio per layer.
        """
        tokens = self._budget(patches, layers)
        if tokens is not None and tokens > patches:
            raise ValueError(
                f"tokens={tokens} does not fit: this image has {patches} patches, allowed is 1 to {patches}"
            )
        if tokens is not None:
            left = schedule.divided(patches, tokens, self.prefix_share)
            return schedule.lengths_for(patches, self._may(layers), left)
        if isinstance(self.ratio, tuple) and len(self.ratio) != layers:
            raise ValueError(
                f"ratio holds {len(self.ratio)} shares; the tower has {layers} layers that can merge"
            )
        return schedule.lengths(patches, self._shares(layers))

    def prefix_length(self, tokens: int, patches: int, layers: int) -> int:
        """Tokens that the prefix leaves of `tokens` that the projector makes.

        Args:
            tokens: of an image, what the tower has left.
            patches: what the tower saw.
            layers: as for `lengths`.

        Raises:
            ValueError: `prefix` asks for more than there are.
        """
        if self.prefix is not None:
            return schedule.left(tokens, self.prefix, "prefix")
        return min(self._budget(patches, layers), tokens) if self.prefix_share else tokens

    def tokens_at(self, patches: int, layers: int) -> int:
        """Image tokens that reach the language model, of an image's `patches`."""
        seen = self.patches_at(patches)
        return self.prefix_length(self.lengths(seen, layers)[-1], seen, layers)

    def _budget(self, patches: int, layers: int) -> int | None:
        """What tower and prefix are to leave together; None where the tower's ratio alone says."""
        if self.tokens is not None or not self.prefix_share:
            return self.tokens
        return schedule.lengths(patches, self._shares(layers))[-1]

    def _may(self, layers: int) -> tuple[bool, ...]:
        """Which tower layers `tokens` or a single `ratio` is for."""
        return tuple(self.depths[0] <= i / layers < self.depths[1] for i in range(layers))

    def _shares(self, layers: int) -> tuple[float, ...]:
        """The share that each tower layer keeps."""
        if isinstance(self.ratio, tuple):
            return self.ratio
        may = self._may(layers)
        if self.ratio not in (None, 1) and not any(may):
            raise ValueError(f"depths={self.depths} holds none of the {layers} layers that can merge")
        return tuple(self.ratio if m and self.ratio else 1.0 for m in may)

    def llm_lengths(self, tokens: int, layers: int) -> tuple[int, ...]:
        """Image tokens in front of the first and behind each of the language model's `layers` layers.

        Raises:
            ValueError: `decoder` names a layer that is not there, or that has none behind it, or asks for
                more tokens than there are.
        """
        if wrong := [i for i in self.decoder if i > layers - 2]:
            raise ValueError(
                f"decoder names layer {wrong[0]}; the language model has {layers} layers, and a layer that "
                f"merges needs one behind it: allowed are 0 to {layers - 2}"
            )
        counts = [tokens]
        for i in range(layers):
            keep = self.decoder.get(i, 1.0)
            counts.append(schedule.left(counts[-1], keep, f"decoder[{i}]"))
        return tuple(counts)
