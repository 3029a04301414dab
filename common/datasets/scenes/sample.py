"""Draws scenes and answers the questions that a probe asks about them.

The labels follow VTAB's two Clevr tasks (Zhai et al., 2019, appendix A): `count` of objects, and
`distance` of the object nearest to the camera; `shape` is the shape of that object.
"""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
from PIL import Image

from common.datasets.scenes.render import (
    Backdrop,
    Camera,
    Light,
    Object,
    Scene,
    Vec3,
    render,
    trace,
)

MIN_OBJECTS, MAX_OBJECTS = 3, 10
SHAPES = ("cube", "sphere", "cylinder")
# Camera to centre of the nearest object, in scene units: sextiles of 5,000 scenes, rounded.
DISTANCE_EDGES = (7.6, 8.5, 9.4, 10.2, 11.1)
MIN_PIXELS = 12  # of every object in the 64x64 frame
MIN_VISIBLE = 0.4  # share of an object's outline that nothing hides
GAP = 0.12  # least distance between footprints on the ground
Circle = tuple[float, float, float]  # u, v, radius in the frame
HUES = (0.0, 0.075, 0.145, 0.25, 0.36, 0.47, 0.56, 0.64, 0.76, 0.89)


def sample_scene(seed: int, index: int) -> Scene:
    """Draws scene number `index` of the world `seed`; equal arguments give equal scenes.

    Args:
      seed: any integer in [0, 2**64).
      index: any integer in [0, 2**64).

    Returns:
      3 to 10 objects, none touching another, each wholly within the frame, with at least
      `MIN_PIXELS` pixels and `MIN_VISIBLE` of its outline in view.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))  # kept, so resampling favours no count
    while True:
        scene = _propose(rng, count)
        if scene is not None and _all_visible(scene):
            return scene


def labels(scene: Scene) -> dict[str, int]:
    """Returns class numbers: `count` in [0, 8), `distance` in [0, 6), `shape` in [0, 3).

    `count` is the number of objects less 3; `distance` bins the Euclidean distance from the camera
    to the centre of the nearest object by `DISTANCE_EDGES`; `shape` indexes `SHAPES`.
    """
    nearest = min(scene.objects, key=lambda obj: _distance(scene.camera, obj))
    return {
        "count": len(scene.objects) - MIN_OBJECTS,
        "distance": int(np.searchsorted(DISTANCE_EDGES, _distance(scene.camera, nearest), "right")),
        "shape": SHAPES.index(nearest.shape),
    }


def example(seed: int, index: int) -> dict[str, bytes | int]:
    """Returns scene `index` as a record: its PNG bytes, its labels and its index."""
    scene = sample_scene(seed, index)
    png = io.BytesIO()
    Image.fromarray(render(scene)).save(png, "PNG", compress_level=3)
    return {"image": png.getvalue(), **labels(scene), "index": index}


def _distance(camera: Camera, obj: Object) -> float:
    return math.dist(camera.position, obj.centre)


def _propose(rng: np.random.Generator, count: int) -> Scene | None:
    """Draws everything once; None where the objects found no room."""
    u = rng.uniform
    # From near to far and low to high, aimed somewhat off: where in the frame the nearest object
    # stands says little about its distance, how large things look says more.
    reach, elevation, azimuth = u(8.0, 14.0), u(0.45, 0.9), u(-0.1, 0.1)
    camera = Camera(
        position=(
            reach * math.cos(elevation) * math.sin(azimuth),
            -reach * math.cos(elevation) * math.cos(azimuth),
            reach * math.sin(elevation),
        ),
        target=(u(-0.5, 0.5), u(-0.5, 0.5), u(-0.2, 1.0)),
        tan_half=u(0.40, 0.48),
        roll=u(-0.06, 0.06),
    )
    objects = _place(rng, camera, count, reach / 10)
    if objects is None:
        return None
    elevation, azimuth = u(0.55, 1.15), u(0, 2 * math.pi)
    warmth, power = u(-0.06, 0.06), u(0.9, 1.3)
    light = Light(
        direction=(
            math.cos(elevation) * math.cos(azimuth),
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        ),
        colour=(power * (1 + warmth), power, power * (1 - warmth)),
        ambient=u(0.15, 0.4),
    )
    backdrop = Backdrop(
        ground=_hsv(u(), u(0.0, 0.25), u(0.45, 0.8)),
        tile=u(0.0, 0.5),
        tile_size=u(1.2, 2.4),
        tile_yaw=u(0, math.pi / 2),
        horizon=_hsv(u(), u(0.0, 0.2), u(0.75, 0.95)),
        zenith=_hsv(u(0.52, 0.66), u(0.2, 0.6), u(0.5, 0.85)),
    )
    return Scene(objects, camera, light, backdrop)


def _place(
    rng: np.random.Generator, camera: Camera, count: int, spread: float
) -> tuple[Object, ...] | None:
    """Throws objects onto the ground until `count` lie free; None after too many throws."""
    u = rng.uniform
    front, back = u(-2.5, -1.0) * spread, u(2.5, 5.5) * spread
    scale = u(0.85, 1.15)  # sizes vary by scene, so that covered area does not give the count
    hues = rng.permutation(HUES).tolist()
    placed: list[tuple[Object, Circle]] = []
    for draw in rng.random((25 * count, 10)).tolist():
        shape, size, x, y, yaw, hue, saturation, value, metal, gloss = draw
        obj = Object(
            shape=SHAPES[int(shape * len(SHAPES))],
            size=scale * _lerp(0.7, 0.95, size),
            x=_lerp(-5.0, 5.0, x),
            # The first lies at the front, so that more objects do not mean nearer objects.
            y=_lerp(front, back, y) if placed else front,
            yaw=2 * math.pi * yaw,
            colour=_hsv(
                hues[len(placed)] + _lerp(-0.015, 0.015, hue),
                _lerp(0.65, 0.95, saturation),
                _lerp(0.75, 1.0, value),
            ),
            specular=_lerp(0.5, 0.9, gloss) if metal < 0.4 else 0.25 * gloss,
            metal=_lerp(0.5, 0.8, gloss) if metal < 0.4 else 0.0,
        )
        circle = camera.project(obj.centre, obj.bound)
        if _fits(obj, circle, placed):
            placed.append((obj, circle))
            if len(placed) == count:
                return tuple(obj for obj, _ in placed)
    return None


def _lerp(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _fits(obj: Object, circle: Circle, placed: list[tuple[Object, Circle]]) -> bool:
    """True where the object is in the frame, touches no other and overlaps the others little."""
    u, v, radius = circle
    if max(abs(u), abs(v)) + radius > 1:
        return False
    for other, (other_u, other_v, other_radius) in placed:
        if math.hypot(obj.x - other.x, obj.y - other.y) < obj.footprint + other.footprint + GAP:
            return False
        if math.hypot(u - other_u, v - other_v) < 0.45 * (radius + other_radius):
            return False
    return True


def _all_visible(scene: Scene) -> bool:
    _, ids, covered = trace(scene)
    visible = np.bincount(ids[ids >= 0], minlength=len(scene.objects))
    return all(visible >= np.maximum(MIN_PIXELS, MIN_VISIBLE * np.asarray(covered)))


def _hsv(hue: float, saturation: float, value: float) -> Vec3:
    """Converts to linear RGB."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return (r**2.2, g**2.2, b**2.2)
