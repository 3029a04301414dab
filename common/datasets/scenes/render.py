"""A small ray caster: spheres, cubes and cylinders on a plane, one sun, soft shadows, in NumPy.

Coordinates are right-handed with z up, and the ground is z = 0. Colours are linear RGB in [0, 1].
Every solid is the intersection of a round part (|p| <= 1 over its `round` axes) and of slabs
(|p_i| <= 1 over its `flat` axes), so one interval test and one normal serve all three.

Shape suffixes: 3 the axes x, y, z or r, g, b; H rows and W columns of rays; N any rays; M rays
that meet an object.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = 64  # pixels a side
SHININESS = 48  # exponent of the highlight
SUN_RADIUS = 0.05  # radians, wider than the real sun: the width of the penumbra
HAZE_DISTANCE = 36.0  # where things have faded by 1 - 1/e into the horizon

Floats = np.ndarray  # float32
Vec3 = tuple[float, float, float]
Axes = Sequence[float] | Sequence[Floats] | Floats  # the x, y and z of one vector or of many


@dataclass(frozen=True)
class Solid:
    """A unit shape: `round` and `flat` axes, and how its extent relates to an object's `size`."""

    round: tuple[int, ...]
    flat: tuple[int, ...]
    scale: float  # chosen so that equal sizes look equally large
    bound: float  # radius of the bounding sphere of the unit shape
    footprint: float  # radius of the bounding circle on the ground


SOLIDS = {
    "cube": Solid((), (0, 1, 2), 0.80, math.sqrt(3), math.sqrt(2)),
    "sphere": Solid((0, 1, 2), (), 1.00, 1.0, 1.0),
    "cylinder": Solid((0, 1), (2,), 0.86, math.sqrt(2), 1.0),
}


@dataclass(frozen=True)
class Object:
    """A solid resting on the ground at `(x, y)`, turned by `yaw` radians about the vertical."""

    shape: str
    size: float
    x: float
    y: float
    yaw: float
    colour: Vec3
    specular: float  # strength of the highlight
    metal: float  # share of the light that is a reflection of the surroundings

    @property
    def solid(self) -> Solid:
        return SOLIDS[self.shape]

    @property
    def scale(self) -> float:
        return self.size * self.solid.scale

    @property
    def centre(self) -> Vec3:
        return (self.x, self.y, self.scale)

    @property
    def bound(self) -> float:
        return self.scale * self.solid.bound

    @property
    def footprint(self) -> float:
        return self.scale * self.solid.footprint


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; `tan_half` is the tangent of half the field of view, `roll` in radians."""

    position: Vec3
    target: Vec3
    tan_half: float
    roll: float

    @functools.cached_property
    def axes(self) -> list[list[float]]:
        """The right, up and forward unit vectors."""
        forward = np.subtract(self.target, self.position)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        up = np.cross(right, forward)
        c, s = math.cos(self.roll), math.sin(self.roll)
        return np.stack([c * right + s * up, c * up - s * right, forward]).tolist()

    def project(self, centre: Vec3, radius: float) -> tuple[float, float, float]:
        """Returns `(u, v, radius)`, a circle round a ball's image in a frame of [-1, 1]^2."""
        right, up, forward = self.axes
        offset = [c - p for c, p in zip(centre, self.position, strict=True)]
        x, y, depth = _dot(right, offset), _dot(up, offset), _dot(forward, offset)
        unit = depth * self.tan_half
        stretch = math.hypot(x, y, depth) / unit  # balls off the axis look longer
        return x / unit, y / unit, stretch * radius / max(depth - radius, 1e-3)


@dataclass(frozen=True)
class Light:
    """The sun in unit `direction` (not straight up) with its `colour`, and `ambient` skylight."""

    direction: Vec3
    colour: Vec3
    ambient: float


@dataclass(frozen=True)
class Backdrop:
    """Ground colours of a tiled floor, and the sky's colours at the horizon and overhead."""

    ground: Vec3
    tile: float  # relative contrast of the tiles
    tile_size: float
    tile_yaw: float
    horizon: Vec3
    zenith: Vec3


@dataclass(frozen=True)
class Scene:
    """All that a picture depends on."""

    objects: tuple[Object, ...]
    camera: Camera
    light: Light
    backdrop: Backdrop


def _dot(a: Axes, b: Axes) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _to_local(obj: Object, v: Axes) -> Axes:
    """Turns and scales vectors into the frame where the object is its unit shape."""
    c, s = math.cos(obj.yaw) / obj.scale, math.sin(obj.yaw) / obj.scale
    return c * v[0] + s * v[1], c * v[1] - s * v[0], v[2] * (1 / obj.scale)


def _interval(solid: Solid, o: Axes, d: Axes) -> tuple[Floats, Floats]:
    """Returns where rays `o + t d` enter and leave the unit shape; they hit where enter < leave."""
    enter, leave = np.float32(-np.inf), np.float32(np.inf)
    for i in solid.flat:
        slope = 1 / (d[i] + np.float32(1e-20))  # so that no ray is quite parallel to a face
        middle, half = -o[i] * slope, np.abs(slope)
        enter = np.maximum(enter, middle - half)
        leave = np.minimum(leave, middle + half)
    if solid.round:
        a = sum(d[i] * d[i] for i in solid.round)
        b = sum(o[i] * d[i] for i in solid.round)
        c = sum(o[i] * o[i] for i in solid.round) - 1
        root = np.sqrt(np.maximum(b * b - a * c, 0))  # a miss becomes an empty interval
        enter = np.maximum(enter, (-b - root) / a)
        leave = np.minimum(leave, (-b + root) / a)
    return enter, leave


def _normal(obj: Object, offset: Axes) -> Floats:
    """Returns unit normals `[3, N]` at surface points, given less the object's centre.

    A point lies on the part of the solid whose bound it fills most.
    """
    p = _to_local(obj, offset)
    n, fill = np.zeros((3, p[0].size), np.float32), np.zeros_like(p[0])
    if obj.solid.round:
        fill = np.sqrt(sum(p[i] * p[i] for i in obj.solid.round))
        for i in obj.solid.round:
            n[i] = p[i]
    for i in obj.solid.flat:
        side = np.abs(p[i])
        wins = side > fill
        fill = np.where(wins, side, fill)
        n[:, wins] = 0
        n[i, wins] = np.sign(p[i][wins])
    c, s = math.cos(obj.yaw), math.sin(obj.yaw)
    return np.stack([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])


def _rays(camera: Camera, side: int) -> Floats:
    """Returns directions `[3, side, side]` with unit depth, through the centres of the cells."""
    u = ((np.arange(side) + 0.5) / side * 2 - 1) * camera.tan_half
    right, up, forward = (np.asarray(axis, np.float32)[:, None, None] for axis in camera.axes)
    column, row = u.astype(np.float32)[None, None, :], u.astype(np.float32)[None, :, None]
    return (forward - up * row) + right * column


def _window(camera: Camera, centre: Vec3, radius: float, side: int) -> tuple[slice, slice]:
    """Returns the rows and columns of a `side` x `side` frame that may see a ball."""
    u, v, reach = camera.project(centre, radius)
    cells = [math.floor((x + 1) / 2 * side) for x in (-v - reach, -v + reach, u - reach, u + reach)]
    top, bottom, left, right = (min(max(x, 0), side) for x in cells)
    return slice(top, bottom + 1), slice(left, right + 1)


def trace(scene: Scene, side: int = SIZE) -> tuple[Floats, NDArray[np.int64], list[int]]:
    """Finds what each of `side` x `side` rays sees first.

    Returns:
      Depth `[side, side]` along the camera's axis (inf: sky), the object's number
      `[side, side]` (-1: ground or sky), and for each object how many rays meet it,
      hidden or not.
    """
    rays_3HW = _rays(scene.camera, side)
    origin = scene.camera.position
    depth_HW = np.where(rays_3HW[2] < 0, -origin[2] / rays_3HW[2], np.float32(np.inf))
    ids_HW = np.full((side, side), -1)
    covered = []
    for k, obj in enumerate(scene.objects):
        at = _window(scene.camera, obj.centre, obj.bound, side)
        o = _to_local(obj, [a - b for a, b in zip(origin, obj.centre, strict=True)])
        enter, leave = _interval(obj.solid, o, _to_local(obj, rays_3HW[:, *at]))
        hit = enter < leave
        covered.append(int(hit.sum()))
        first = hit & (enter < depth_HW[at])
        depth_HW[at][first] = enter[first]
        ids_HW[at][first] = k
    return depth_HW, ids_HW, covered


def _unit(v: Floats) -> Floats:
    return v / np.sqrt(_dot(v, v))


def _over(vector: Vec3, like: Floats) -> Floats:
    """Returns a vector shaped `[3, 1, ...]`, to be broadcast over `like`."""
    return np.asarray(vector, np.float32).reshape(3, *[1] * (like.ndim - 1))


def _sky(backdrop: Backdrop, d: Floats) -> Floats:
    """Returns what unit directions `[3, ...]` see; below the horizon, the ground's mean colour."""
    up, down = np.sqrt(d[2].clip(0, 1)), (-6 * d[2]).clip(0, 1)
    horizon, zenith, ground = (
        _over(colour, d) for colour in (backdrop.horizon, backdrop.zenith, backdrop.ground)
    )
    return horizon + (zenith - horizon) * up + (ground - horizon) * down


def _sun(light: Light) -> Floats:
    """Returns `[3, 2, 2]`: the rays of a pixel each look at another point of the sun's disc."""
    direction = np.asarray(light.direction)
    east = np.cross(direction, (0.0, 0.0, 1.0))
    east /= np.linalg.norm(east)
    axes = np.stack([east, np.cross(east, direction)], 1)
    disc = SUN_RADIUS / math.sqrt(5) * np.array([[-2, -1, 1, 2], [1, -2, 2, -1]])
    points = direction[:, None] + (axes[:, :, None] * disc).sum(1)
    return points.reshape(3, 2, 2).astype(np.float32)


def _arriving(scene: Scene, p_3HW: Floats, n_3HW: Floats, sun_3HW: Floats) -> tuple[Floats, Floats]:
    """Returns the shares `[H, W]` of sunlight (0 or 1) and of skylight that reach the points."""
    sun_HW, sky_HW = np.ones_like(p_3HW[0]), np.ones_like(p_3HW[0])
    p_3HW = p_3HW + 1e-3 * n_3HW  # off the surface, so that nothing shadows itself
    for obj in scene.objects:
        # No shadow is longer, and further off the object hides less than 3 % of the ground's sky.
        reach = obj.bound + 2 * obj.scale / scene.light.direction[2]
        at = _window(scene.camera, obj.centre, reach, p_3HW.shape[-1])
        n, sun = n_3HW[:, *at], sun_3HW[:, *at]
        to = _over(obj.centre, n) - p_3HW[:, *at]
        distance2, along = _dot(to, to), _dot(to, sun)
        near = (distance2 - along * along < obj.bound**2) & (along > -obj.bound)
        hit = np.flatnonzero(near)
        to_3N, sun_3N = (v.reshape(3, -1).take(hit, 1) for v in (to, sun))
        enter, leave = _interval(obj.solid, _to_local(obj, -to_3N), _to_local(obj, sun_3N))
        near[near] = (enter < leave) & (leave > 0)
        sun_HW[at][near] = 0
        # A ball of radius r at distance d hides cos(angle) r^2/d^2 of a cosine-weighted sky.
        r2 = np.float32(obj.scale**2)
        d2 = np.maximum(distance2, r2)
        sky_HW[at] *= 1 - (_dot(to, n) * r2 / (d2 * np.sqrt(d2))).clip(0, 1)
    return sun_HW, sky_HW


def _tiles(backdrop: Backdrop, p_3HW: Floats) -> Floats:
    """Returns -1/2 or 1/2 by the tile a ground point lies on."""
    c, s = (f(backdrop.tile_yaw) / backdrop.tile_size for f in (math.cos, math.sin))
    a, b = c * p_3HW[0] + s * p_3HW[1], c * p_3HW[1] - s * p_3HW[0]
    parity = (np.floor(a).astype(np.int32) + np.floor(b).astype(np.int32)) & 1
    return parity.astype(np.float32) - 0.5


def render(scene: Scene) -> NDArray[np.uint8]:
    """Renders a scene to `uint8[64, 64, 3]` (gamma 2.2), row 0 at the top.

    Lambert shading under sun and sky, a Blinn-Phong highlight, a mirror bounce into the sky for
    metals, soft shadows, skylight occluded by neighbours, and haze towards the horizon.
    """
    side = 2 * SIZE  # four rays a pixel
    depth_HW, ids_HW, _ = trace(scene, side)
    view_3HW = _rays(scene.camera, side)
    is_sky = np.isinf(depth_HW)
    depth_HW[is_sky] = 1.0  # any number: the sky is painted over at the end
    p_3HW = _over(scene.camera.position, view_3HW) + depth_HW * view_3HW
    n_3HW = np.zeros_like(p_3HW)
    n_3HW[2] = 1.0
    for k, obj in enumerate(scene.objects):
        at = _window(scene.camera, obj.centre, obj.bound, side)
        mine = ids_HW[at] == k
        p_3M = p_3HW[:, *at][:, mine]
        n_3HW[:, *at][:, mine] = _normal(obj, p_3M - _over(obj.centre, p_3M))
    sun_3HW = np.tile(_sun(scene.light), (1, SIZE, SIZE))
    sun_HW, sky_HW = _arriving(scene, p_3HW, n_3HW, sun_3HW)
    haze_HW = 1 - np.exp(-((depth_HW / HAZE_DISTANCE) ** 2))

    tiles_HW = scene.backdrop.tile * (1 - haze_HW) * _tiles(scene.backdrop, p_3HW)
    colour_3HW = _over(scene.backdrop.ground, p_3HW) * (1 + tiles_HW)
    solid = np.flatnonzero(ids_HW >= 0)  # the M rays that meet an object
    owner = ids_HW.ravel()[solid]
    colour_3M = np.float32([obj.colour for obj in scene.objects]).reshape(-1, 3).T.take(owner, 1)
    colour_3HW.reshape(3, -1)[:, solid] = colour_3M
    light = _over(scene.light.colour, p_3HW)
    sunlit_HW = sun_HW * _dot(n_3HW, sun_3HW).clip(0)
    skylit_HW = scene.light.ambient * sky_HW * (0.65 + 0.35 * n_3HW[2])
    rgb_3HW = colour_3HW * (light * sunlit_HW + skylit_HW)

    specular_M = np.float32([obj.specular for obj in scene.objects])[owner] * sun_HW.ravel()[solid]
    metal_M = np.float32([obj.metal for obj in scene.objects])[owner]
    view_3M, n_3M, to_sun_3M, rgb_3M = (
        v.reshape(3, -1).take(solid, 1) for v in (view_3HW, n_3HW, sun_3HW, rgb_3HW)
    )
    view_3M = _unit(view_3M)
    bounce_3M = view_3M - 2 * _dot(view_3M, n_3M) * n_3M
    mirror_3M = colour_3M * _sky(scene.backdrop, bounce_3M) * (0.4 + 0.6 * sky_HW.ravel()[solid])
    highlight_M = _dot(n_3M, _unit(to_sun_3M - view_3M)).clip(0) ** SHININESS
    rgb_3M += metal_M * (mirror_3M - 0.6 * rgb_3M) + light[:, 0] * specular_M * highlight_M
    rgb_3HW.reshape(3, -1)[:, solid] = rgb_3M

    rgb_3HW += haze_HW * (_over(scene.backdrop.horizon, p_3HW) - rgb_3HW)
    rgb_3HW[:, is_sky] = _sky(scene.backdrop, _unit(view_3HW[:, is_sky]))
    rgb_3HW = rgb_3HW.clip(0, 1)
    rows = rgb_3HW[:, 0::2] + rgb_3HW[:, 1::2]
    mean = (rows[..., 0::2] + rows[..., 1::2]) / 4
    return (255 * mean ** np.float32(1 / 2.2) + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()
