"""Sizes of I-JEPA models (docs/papers/ijepa.md 1.3, 1.4)."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ViTConfig:
    """Encoder and predictor shapes.

    Attributes:
      image: (height, width) in pixels; both must divide into patches.
      width, depth, heads, hidden: the encoder; hidden is the MLP's inner width.
      predictor_width, predictor_depth, predictor_heads: the predictor (heads None: the encoder's count, as released).
      depth_rescale: divide output projections of block l by sqrt(2 l) at init. The released models were trained
        without it, as a later re-draw undoes it (docs/papers/ijepa.md 1.5).
      position_scale: factor on the encoder's position table; 1 as released. At init the table outweighs the patches,
        targets are mostly position, and short runs spend themselves on that: below 1, content leads from the start.
    """

    image: tuple[int, int]
    patch: int
    width: int
    depth: int
    heads: int
    hidden: int
    predictor_width: int = 384
    predictor_depth: int = 6
    predictor_heads: int | None = None
    channels: int = 3
    depth_rescale: bool = False
    position_scale: float = 1.0

    def __post_init__(self):
        heads = self.heads, self.heads if self.predictor_heads is None else self.predictor_heads
        if min(self.patch, self.width, *heads, self.hidden, *self.image) < 1:
            raise ValueError(f"model sizes must be at least 1, got {self}")
        for side in self.image:
            if side % self.patch:
                raise ValueError(
                    f"model.image={self.image} does not divide into patches of {self.patch}: "
                    f"choose a multiple, such as {-(-side // self.patch) * self.patch}"
                )
        for width, count, what in (
            (self.width, heads[0], "width"),
            (self.predictor_width, heads[1], "predictor_width"),
        ):
            if width % count:
                raise ValueError(f"model.{what}={width} does not divide into {count} heads")
            if width % 4:
                raise ValueError(f"model.{what}={width}: 2-D positions need a multiple of 4")
        if min(self.depth, self.predictor_depth) < 1:
            raise ValueError("model.depth and model.predictor_depth must be at least 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per (column, row) of the image: (rows, cols)."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def tokens(self) -> int:
        rows, cols = self.grid
        return rows * cols


# name: width, depth, heads, hidden; predictor width, depth
SIZES = {
    "tiny": (192, 12, 3, 768, 96, 6),
    "small": (384, 12, 6, 1536, 192, 6),
    "base": (768, 12, 12, 3072, 384, 6),
    "large": (1024, 24, 16, 4096, 384, 12),
    "huge": (1280, 32, 16, 5120, 384, 12),
    "giant": (1408, 40, 16, 6144, 384, 16),
}


def vit(size: str, *, image: int | tuple[int, int], patch: int, **overrides) -> ViTConfig:
    """A model of a named size, e.g. `vit("huge", image=224, patch=14)`. `overrides` replace single fields."""
    if size not in SIZES:
        raise ValueError(f"model size {size!r} is unknown; known sizes: {', '.join(SIZES)}")
    width, depth, heads, hidden, p_width, p_depth = SIZES[size]
    high, wide = (image, image) if isinstance(image, int) else image
    config = ViTConfig((high, wide), patch, width, depth, heads, hidden, p_width, p_depth)
    return replace(config, **overrides)
