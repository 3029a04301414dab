"""Multi-block masks (I-JEPA, Assran et al., CVPR 2023, section 3 and appendix A.1).

An image of N = H * W patches gets `num_targets` rectangular target blocks, which may overlap each
other, and one context: a large block minus all targets. Two samplers give the same kind of output:

`fixed`  Scale and aspect are drawn independently for every block of every image, a block may lie anywhere, and a
         random subset of the context meets a token budget. An image whose draw leaves less draws again.
`paper`  The rules of the released collator: one uniform sets scale and aspect alike, all images of a group of
         `collate` share one target size and one context size, starts stop one short of the last row and column,
         and every context is cut to the group's smallest by keeping its first patches in raster order. The cut is
         part of the published recipe: at 16 x 16 patches and 128 images it takes the context from .43 N to .27 N.

Masks are a pure function of the seed and the row's position in the stream of examples, so they do not depend on
batching, workers, hosts or the step a run resumed from.

Axes: B images, M target blocks, Kc and Kt padded lengths, N patches, H and W the grid's sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

Grid = tuple[int, int]
Range = tuple[float, float]
Array = Any  # of NumPy or, inside a jitted step, of JAX

_MIN_ACCEPTANCE = 0.5  # share of images that must succeed at the first draw
_MAX_DRAWS = 64  # with the above, an image fails them all about once in 2**64
_PAPER_RETRIES = 20  # failures after which the released collator drops one constraint


class Masks(NamedTuple):
    """Flat patch indices, ascending (raster order) along the last axis, valid entries first.

    Padded slots hold index 0, so that a gather stays inside the image; what was gathered there
    must be masked out of attention and loss. In `fixed` mode no context slot is padded.
    """

    context: Array  # int32 [B, Kc]
    context_valid: Array  # bool [B, Kc]
    targets: Array  # int32 [B, M, Kt]
    target_valid: Array  # bool [B, M, Kt]


@dataclass(frozen=True)
class MaskSpec:
    """What to draw. A spec that could not be sampled is refused when it is built.

    Attributes:
      grid: (H, W), the rows and columns of patches.
      mode: sampler, "fixed" or "paper"; see the module's text.
      context_scale: range of the context block's area as a share of N; its aspect is 1.
      target_scale: range of a target block's area as a share of N.
      target_aspect: range of a target block's height / width.
      num_targets: target blocks per image, M.
      min_keep: a context must have more tokens than this; in `paper` mode a target block too.
      context_tokens: in `fixed` mode the context's length; None means N // 4, after the average of .25 N
        that the paper reports. In `paper` mode a cap on top of the group's cut, which keeps static
        shapes tight; None means none: the largest context that could occur.
      collate: images that share block sizes and a context length in `paper` mode, the released
        recipe's batch per GPU. The larger the group, the smaller its contexts.

    Raises:
      ValueError: a value is out of range, a block can be too small for `min_keep`, or most images
        could not meet the token budget.
    """

    grid: Grid
    mode: str = "fixed"
    context_scale: Range = (0.85, 1.0)
    target_scale: Range = (0.15, 0.2)
    target_aspect: Range = (0.75, 1.5)
    num_targets: int = 4
    min_keep: int = 10
    context_tokens: int | None = None
    collate: int = 128

    def __post_init__(self):
        self.validate()

    @cached_property
    def context_size(self) -> int:
        """Kc: the budget in `fixed` mode, the largest context that is kept in `paper` mode."""
        if self.mode == "paper":
            bound = _paper_context_bound(self)
            return min(bound, self.context_tokens or bound)
        return self.context_tokens or self.grid[0] * self.grid[1] // 4

    @cached_property
    def target_size(self) -> int:
        """Kt: the area of the largest target block that can occur."""
        if self.mode == "fixed":
            return _fixed_target_bound(self)
        return int(_paper_sizes(self.grid, self.target_scale, self.target_aspect).prod(-1).max())

    def validate(self) -> None:
        """Raises ValueError if the spec cannot be sampled. Takes a millisecond or two."""
        if self.mode not in ("fixed", "paper"):
            raise ValueError(f'mode is {self.mode!r}; use "fixed" or "paper"')
        if len(self.grid) != 2 or min(self.grid) < 2:
            raise ValueError(f"grid is {self.grid}; give (rows, cols) of patches, each at least 2")
        for name, top in {"context_scale": 1, "target_scale": 1, "target_aspect": np.inf}.items():
            bounds = getattr(self, name)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= top:
                raise ValueError(f"{name} is {bounds}; give (low, high), 0 < low <= high <= {top}")
        for name, low in dict(num_targets=1, collate=1, min_keep=0, context_tokens=1).items():
            if (value := getattr(self, name)) is not None and value < low:
                raise ValueError(f"{name} is {value}; give at least {low}")
        (_validate_fixed if self.mode == "fixed" else _validate_paper)(self)


def sample(spec: MaskSpec, seed: int, rows: np.ndarray) -> Masks:
    """Draws the masks of the examples at global positions `rows` (integers [B], not negative).

    Row g's masks depend on (seed, g) alone; in `paper` mode on (seed, g // collate, g % collate),
    and a call does the work of every whole group that it touches.
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or (rows < 0).any():
        raise ValueError(f"rows is {rows!r}; give a vector of integers from 0 up")
    return (_sample_fixed if spec.mode == "fixed" else _sample_paper)(spec, seed, rows)


def overlap(masks: Masks) -> np.ndarray:
    """Marks the context slots whose patch is also a target of the same image: bool [B, Kc].

    Never true in `fixed` mode. In `paper` mode the released rules let a context overlap targets
    once 20 draws left too little outside them, which happens on small grids (8 x 8) only.
    """
    n = 1 + int(max(masks.context.max(initial=0), masks.targets.max(initial=0)))
    is_target = _occupied(masks.targets, masks.target_valid, n)
    return np.take_along_axis(is_target, masks.context, 1) & masks.context_valid


def assert_disjoint(masks: Masks) -> None:
    """Raises AssertionError, naming image and patch, if a context holds a patch of its targets.

    Cheap enough for every batch: a leak trains without complaint and only spoils the results.
    `paper` mode on small grids leaks by its own rules; there, watch `overlap` instead.
    """
    if (leaks := overlap(masks)).any():
        row, slot = np.argwhere(leaks)[0]
        raise AssertionError(
            f"context and targets overlap in {leaks.any(1).sum()} of {len(leaks)} images, first in "
            f"image {row} at patch {masks.context[row, slot]}; look for what changed the masks"
        )


class Coverage(NamedTuple):
    """How often each patch is used, and how many patches the blocks have."""

    context: np.ndarray  # float64 [H, W], share of images with the patch in their context
    target: np.ndarray  # float64 [H, W], share of images with the patch in any of their targets
    context_sizes: np.ndarray  # int64 [n]
    target_sizes: np.ndarray  # int64 [n, M]
    union_sizes: np.ndarray  # int64 [n], patches in at least one target


def coverage(spec: MaskSpec, n: int, seed: int = 0) -> Coverage:
    """Measures the masks of rows 0 to n - 1, for pictures and for tests."""
    step = spec.collate * max(1, 2048 // spec.collate)  # whole groups, in bounded memory
    patches = spec.grid[0] * spec.grid[1]
    parts = []
    for first in range(0, n, step):
        m = sample(spec, seed, np.arange(first, min(n, first + step)))
        used = [_occupied(*part, patches) for part in (m[:2], m[2:])]  # by context, by targets
        parts.append((*used, m.target_valid.sum(-1)))
    in_context, in_target, target_sizes = map(np.concatenate, zip(*parts))
    context, target = (mask.mean(0).reshape(spec.grid) for mask in (in_context, in_target))
    return Coverage(context, target, in_context.sum(1), target_sizes, in_target.sum(1))


def _occupied(indices: np.ndarray, valid: np.ndarray, n: int) -> np.ndarray:
    """The patches among valid indices [B, ...] as bool [B, n]."""
    start = n * np.arange(len(indices)).reshape(-1, *[1] * (indices.ndim - 1))
    occupied = np.zeros(len(indices) * n, bool)
    occupied[(start + indices)[valid]] = True
    return occupied.reshape(-1, n)


def _sample_fixed(spec: MaskSpec, seed: int, rows: np.ndarray) -> Masks:
    b, n, budget = len(rows), spec.grid[0] * spec.grid[1], spec.context_size
    keys = _stream(seed, rows)
    targets = np.empty((b, spec.num_targets, 4), np.int32)
    free = np.empty((b, n), bool)
    todo = np.arange(b)
    for draw in range(_MAX_DRAWS):
        uniforms = partial(_uniforms, _fold(keys[todo], 1 + draw))
        targets[todo], free[todo] = draw_fixed(spec, uniforms)
        todo = todo[free[todo].sum(1) < budget]
        if not todo.size:
            break
    else:
        raise RuntimeError(f"row {rows[todo[0]]}: no room for the context; lower it in {spec}")
    # A uniform subset of the free patches: those with the smallest of n random numbers.
    rank = np.where(free, _uniforms(_fold(keys, 0), n), 1)
    context = np.argpartition(rank, budget - 1, axis=1)[:, :budget].astype(np.int32)
    context.sort(axis=1)
    return Masks(context, np.ones((b, budget), bool), *block_indices(spec, targets))


def draw_fixed(spec: MaskSpec, uniforms: Callable[[int], Array]) -> tuple[Array, Array]:
    """One draw: target rectangles [B, M, 4] and what they leave of the context [B, N]; `uniforms` makes [B, n] of n."""
    m = spec.num_targets
    u = uniforms(5 * (m + 1)).reshape(-1, m + 1, 5)
    target_hw = _fixed_size(spec.grid, spec.target_scale, spec.target_aspect, u[:, :m])
    context_hw = _fixed_size(spec.grid, spec.context_scale, (1.0, 1.0), u[:, m:])
    hw = u.__array_namespace__().concatenate([target_hw, context_hw], 1)
    blocks = _place(hw, np.array([[spec.grid]]) - hw + 1, u[..., 3:])
    covered = _cover(spec.grid, blocks)
    return blocks[:, :m], covered[:, m] & ~covered[:, :m].any(1)


def _fixed_size(grid: Grid, scale: Range, aspect: Range, u: Array) -> Array:
    """(height, width) [..., 2] from uniforms [..., 3+] for the scale, the aspect and a coin.

    The coin says which side is rounded first; the other takes what is left of the area. So the
    area stays close to its draw, the context block varies, rows and columns are alike, and a side
    that meets the grid's edge lengthens the other instead of shrinking the block.
    """
    xp = u.__array_namespace__()
    area = grid[0] * grid[1] * _lerp(scale, u[..., 0])
    ratio = _lerp(aspect, u[..., 1])
    tall = u[..., 2] < 0.5
    limit, other_limit = xp.where(tall, grid[0], grid[1]), xp.where(tall, grid[1], grid[0])
    side = xp.sqrt(area * xp.where(tall, ratio, 1 / ratio))
    side = xp.rint(xp.clip(side, area / other_limit, limit)).clip(1)
    other = xp.rint(area / side).clip(1, other_limit)
    return xp.stack([xp.where(tall, side, other), xp.where(tall, other, side)], -1)


def _fixed_target_bound(spec: MaskSpec) -> int:
    """The largest area that `_fixed_size` can give to a target."""
    (low, high), (rows, cols) = spec.target_aspect, spec.grid
    most, best = rows * cols * spec.target_scale[1], 0
    for limit, other_limit, lo, hi in (rows, cols, low, high), (cols, rows, 1 / high, 1 / low):
        side = np.arange(1, limit + 1)
        # Before rounding, the side grows with area and ratio: the largest area whose side still
        # rounds down to `side` has the lowest ratio.
        area = np.minimum(most, np.minimum((side + 0.5) ** 2 / lo, (side + 0.5) * other_limit))
        area[-1] = most
        longest = np.rint(np.clip(np.sqrt(area * hi), area / other_limit, limit)).clip(1)
        other = np.rint(area / side).clip(1, other_limit)
        best = max(best, (side * other)[longest >= side].max())
    return int(best)


def _validate_fixed(spec: MaskSpec) -> None:
    if spec.context_size <= spec.min_keep:
        raise ValueError(
            f"the context of grid {spec.grid} has {spec.context_size} tokens, and min_keep "
            f"{spec.min_keep} demands more; raise context_tokens or the grid, or lower min_keep"
        )
    free = draw_fixed(spec, partial(_uniforms, _stream(0, np.arange(256))))[1].sum(1)
    if np.mean(free >= spec.context_size) < _MIN_ACCEPTANCE:
        room = int(np.quantile(free, 0.25))
        lower = f"set context_tokens to at most {room}, or " if room > spec.min_keep else ""
        raise ValueError(
            f"most images have fewer than {spec.context_size} context patches left on {spec}; {lower}"
            "use fewer or smaller targets, or a larger context_scale"
        )


def _sample_paper(spec: MaskSpec, seed: int, rows: np.ndarray) -> Masks:
    m, n = spec.num_targets, spec.grid[0] * spec.grid[1]
    grid = np.array(spec.grid)
    groups, group_of = np.unique(rows // spec.collate, return_inverse=True)
    group_keys = _stream(seed, groups)
    u = np.repeat(_uniforms(_fold(group_keys, 0), 2), spec.collate, 0)[:, :, None]
    target_hw = _paper_size(spec.grid, spec.target_scale, spec.target_aspect, u[:, 0])
    context_hw = _paper_size(spec.grid, spec.context_scale, (1.0, 1.0), u[:, 1])

    # Starts lie below side - block, not at it: the last row and column are never used.
    keys = _fold(group_keys[:, None], 1 + np.arange(spec.collate)).reshape(-1)
    u = _uniforms(_fold(keys, 0), 2 * m).reshape(-1, m, 2)
    targets = _place(target_hw, grid - target_hw, u)
    covered = _cover(spec.grid, targets)
    free = np.empty((len(keys), n), bool)
    todo = np.arange(len(keys))
    for failures in range(_PAPER_RETRIES * m + 1):
        kept = m - failures // _PAPER_RETRIES  # the last constraints go first
        hw, u = context_hw[todo], _uniforms(_fold(keys[todo], 1 + failures), 2)[:, None]
        block = _cover(spec.grid, _place(hw, grid - hw, u))[:, 0]
        free[todo] = block & ~covered[todo, :kept].any(1)
        todo = todo[free[todo].sum(1) <= spec.min_keep]
        if not todo.size:
            break

    mine = group_of * spec.collate + rows % spec.collate
    shortest = free.sum(1).reshape(-1, spec.collate).min(1)[group_of]
    valid = np.arange(spec.context_size) < shortest[:, None]
    context = np.sort(np.where(free[mine], np.arange(n, dtype=np.int32), np.int32(n)), axis=1)
    context = np.where(valid, context[:, : spec.context_size], np.int32(0))
    return Masks(context, valid, *block_indices(spec, targets[mine]))


def _paper_size(grid: Grid, scale: Range, aspect: Range, u: np.ndarray) -> np.ndarray:
    """(height, width) [..., 2] from one uniform [...], which sets scale and aspect alike."""
    area = np.floor(grid[0] * grid[1] * _lerp(scale, u))
    ratio = _lerp(aspect, u)
    hw = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], -1)))
    return np.minimum(hw, np.array(grid) - 1).astype(np.int32)


def _paper_sizes(grid: Grid, scale: Range, aspect: Range) -> np.ndarray:
    """Every (height, width) [S, 2] that `_paper_size` can give.

    The size only changes at uniforms where the area passes a whole number or a side passes a half;
    it is evaluated there, on either side, and half-way between.
    """
    n = grid[0] * grid[1]
    areas = np.arange(max(1, np.floor(n * scale[0])), np.floor(n * scale[1]) + 2)
    halves = (np.arange(max(grid)) + 0.5)[:, None] ** 2
    ratios = np.concatenate([halves / areas, areas / halves]).reshape(-1)
    cuts = [np.array([0.0, 1.0])]
    for (low, high), values in (scale, areas / n), (aspect, ratios):
        if high > low:
            cuts.append((values - low) / (high - low))
    cuts = np.unique(np.clip(np.concatenate(cuts), 0, 1))
    middles = (cuts[1:] + cuts[:-1]) / 2
    u = np.concatenate([cuts, np.nextafter(cuts, 0), np.nextafter(cuts, 1), middles])
    return np.unique(_paper_size(grid, scale, aspect, u[u < 1]), axis=0)


def _paper_context_bound(spec: MaskSpec) -> int:
    """The largest context that can occur: all targets in one place, as far off as they can be.

    It loses at least what it must share with one target inside the (H-1) x (W-1) patches in use,
    unless one target can take so much that every constraint may be dropped.
    """
    target_hw = _paper_sizes(spec.grid, spec.target_scale, spec.target_aspect)
    context_hw = _paper_sizes(spec.grid, spec.context_scale, (1.0, 1.0))[:, None]
    area = context_hw.prod(-1)
    shared = np.maximum(context_hw + target_hw - (np.array(spec.grid) - 1), 0).prod(-1)
    droppable = area - target_hw.prod(-1) <= spec.min_keep
    return int(np.where(droppable, area, area - shared).max())


def _validate_paper(spec: MaskSpec) -> None:
    for name, aspect in {"target": spec.target_aspect, "context": (1.0, 1.0)}.items():
        sizes = _paper_sizes(spec.grid, getattr(spec, f"{name}_scale"), aspect)
        h, w = sizes[sizes.prod(-1).argmin()]
        if h * w <= spec.min_keep:
            raise ValueError(
                f"a {name} block on grid {spec.grid} can have {h} x {w} = {h * w} patches, and "
                f"min_keep {spec.min_keep} demands more (the released collator loops forever); "
                f"lower min_keep, or raise the grid or {name}_scale"
            )


def _place(hw: Array, starts: Array, u: Array) -> Array:
    """(top, left, height, width) int32 [B, M, 4]; top and left are uniform below `starts`."""
    xp = u.__array_namespace__()
    return xp.concatenate([u * starts, xp.broadcast_to(hw, u.shape)], -1).astype(np.int32)


def _cover(grid: Grid, blocks: Array) -> Array:
    """The patches of rectangles [B, M, 4] as bool [B, M, N]."""
    top, left, h, w = (blocks[..., side, None] for side in range(4))
    y, x = (np.arange(side, dtype=np.int32)[None, None] for side in grid)
    in_rows, in_cols = (y >= top) & (y < top + h), (x >= left) & (x < left + w)
    covered = in_rows[..., :, None] & in_cols[..., None, :]
    return covered.reshape(*blocks.shape[:-1], y.size * x.size)


def block_indices(spec: MaskSpec, blocks: Array) -> tuple[Array, Array]:
    """Flat indices int32 [B, M, Kt] and validity of rectangles [B, M, 4]."""
    top, left, h, w = (blocks[..., side, None] for side in range(4))
    slot = np.arange(spec.target_size, dtype=np.int32)[None, None]
    valid = slot < h * w
    return ((top + slot // w) * np.int32(spec.grid[1]) + left + slot % w) * valid, valid


def _lerp(bounds: Range, u: Array) -> Array:
    return bounds[0] + u * (bounds[1] - bounds[0])


def _fold(key: np.ndarray, data: np.ndarray | np.integer | int) -> np.ndarray:
    """A new key for each pair of key (uint64, an array) and data: one step of SplitMix64.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Hashing
    the position of a number vectorises over a batch, which a NumPy Generator per image does not.
    """
    z = key + (np.atleast_1d(data).astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27)) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> 31)


def _stream(seed: int, positions: np.ndarray) -> np.ndarray:
    """Keys uint64 [B] of positions [B] under a seed, any integer (taken modulo 2**64)."""
    return _fold(_fold(np.zeros(1, np.uint64), np.uint64(seed % 2**64)), positions)


def _uniforms(keys: np.ndarray, n: int) -> np.ndarray:
    """`n` uniforms in [0, 1) for each key: float64 [B, n]."""
    return (_fold(keys[:, None], np.arange(n)) >> 11) * 2.0**-53
