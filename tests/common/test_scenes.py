"""What a user of the `scenes` data relies on: honest geometry, honest labels, a stable world."""

import dataclasses
import io
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.datasets.scenes import builder
from common.datasets.scenes.render import (
    SIZE,
    SOLIDS,
    Backdrop,
    Camera,
    Light,
    Object,
    Scene,
    _interval,
    _rays,
    render,
    trace,
)
from common.datasets.scenes.sample import (
    DISTANCE_EDGES,
    MIN_PIXELS,
    SHAPES,
    example,
    labels,
    sample_scene,
)

CAMERA = Camera(position=(0.3, -8.0, 4.0), target=(0.0, 0.0, 0.4), tan_half=0.45, roll=0.02)
GREY = Backdrop((0.4, 0.4, 0.4), 0.0, 1.0, 0.0, (0.6, 0.7, 0.8), (0.2, 0.4, 0.8))
seeds = st.integers(0, 2**64 - 1)


def thing(shape: str, x: float = 0.0, y: float = 0.0, size: float = 0.8) -> Object:
    return Object(shape, size, x, y, yaw=0.7, colour=(0.8, 0.1, 0.1), specular=0.2, metal=0.0)


def lit(*objects: Object, direction=(0.6, 0.0, 0.8), ambient: float = 0.3) -> Scene:
    return Scene(objects, CAMERA, Light(direction, (1.0, 1.0, 1.0), ambient), GREY)


def inside(obj: Object, p: np.ndarray, margin: float) -> np.ndarray:
    """Whether points [..., 3] lie in a solid grown by a relative margin: the definition itself."""
    q = (p - np.array([obj.x, obj.y, obj.scale])) / obj.scale
    c, s = math.cos(obj.yaw), math.sin(obj.yaw)
    x, y, z = c * q[..., 0] + s * q[..., 1], c * q[..., 1] - s * q[..., 0], q[..., 2]
    grown = 1 + margin
    if obj.shape == "sphere":
        return x**2 + y**2 + z**2 <= grown**2
    if obj.shape == "cylinder":
        return (x**2 + y**2 <= grown**2) & (abs(z) <= grown)
    return (abs(x) <= grown) & (abs(y) <= grown) & (abs(z) <= grown)


def pixel(image: np.ndarray, x: float, y: float) -> float:
    """The brightness where the camera sees the ground point (x, y)."""
    u, v, _ = CAMERA.project((x, y, 0.0), 0.01)
    return float(image[int((1 - v) / 2 * SIZE), int((1 + u) / 2 * SIZE)].mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_stop_at_the_surface_that_marching_finds(shape):
    obj = thing(shape)
    depth, ids, covered = trace(lit(obj))
    origin = np.array(CAMERA.position)
    rays = np.moveaxis(_rays(CAMERA, SIZE).astype(np.float64), 0, -1)
    hit = ids == 0
    assert 100 < hit.sum() == covered[0]
    surface = origin + rays[hit] * depth[hit][:, None]
    assert inside(obj, surface, 2e-3).all() and not inside(obj, surface, -2e-3).any()
    along = np.linspace(0, 1, 400)[:, None, None]
    before = origin + rays[hit] * depth[hit][:, None] * along * 0.999
    assert not inside(obj, before, -5e-3).any()  # nothing nearer was passed
    missed = origin + rays[~hit] * 14 * along
    assert not inside(obj, missed, -5e-3).any()


@pytest.mark.parametrize(("height", "met"), [(0.0, True), (1.5, False)])
def test_a_ray_parallel_to_faces_meets_the_cube_or_passes_it(height, met):
    along_x = np.array([[1.0], [0.0], [0.0]], np.float32)
    enter, leave = _interval(SOLIDS["cube"], (-3.0, 0.0, height), along_x)
    assert (enter < leave) == met
    if met:
        assert (enter.item(), leave.item()) == pytest.approx((2.0, 4.0))


@pytest.mark.parametrize("far", [0, 1])
def test_a_nearer_object_hides_a_farther_one(far):
    pair = [thing("sphere", y=-2.0, size=1.0)]
    pair.insert(far, thing("cube", y=2.0))
    _, ids, covered = trace(lit(*pair))
    _, alone, _ = trace(lit(pair[far]))
    assert covered[far] == (alone == 0).sum()  # hidden or not
    assert (ids == far).sum() < covered[far]
    assert (ids == 1 - far).sum() == covered[1 - far]


@pytest.mark.parametrize("shape", SHAPES)
def test_shadows_fall_away_from_the_sun_and_touch_the_object(shape):
    obj = thing(shape)  # the sun stands in +x, four units up for three across
    with_it, without = (render(scene) for scene in (lit(obj), lit()))
    edge = obj.scale if shape == "sphere" else obj.footprint
    assert pixel(with_it, -edge - 0.1, 0.0) < 0.8 * pixel(without, -edge - 0.1, 0.0)
    assert pixel(with_it, edge + 0.4, 0.0) > 0.9 * pixel(without, edge + 0.4, 0.0)
    assert pixel(with_it, -edge - 2.5, 0.0) == pytest.approx(
        pixel(without, -edge - 2.5, 0.0), rel=0.05
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_sides_turned_to_the_sun_are_bright(shape):
    scene = lit(thing(shape))
    _, ids, _ = trace(scene)
    rows, columns = np.nonzero(ids == 0)
    right = columns > columns.mean()
    lower = rows > rows.mean()  # the upper half of a cube or cylinder is mostly its top
    image, mirrored = (
        render(lit(thing(shape), direction=(x, 0.0, 0.8)))[ids == 0].mean(-1) for x in (0.6, -0.6)
    )
    assert image[right & lower].mean() > image[~right & lower].mean() + 10
    assert mirrored[right & lower].mean() < mirrored[~right & lower].mean() - 10
    assert image[rows < rows.min() + 4].mean() > image[~right & lower].mean() + 10


@pytest.mark.parametrize(
    "side", [(math.sin(0.7), -math.cos(0.7)), (-math.cos(0.7), -math.sin(0.7))]
)
def test_a_turned_cube_is_lit_by_its_own_faces(side):
    cube = dataclasses.replace(thing("cube"), specular=0.0)
    sun = (0.954 * side[0], 0.954 * side[1], 0.3)
    u, v, _ = CAMERA.project((cube.scale * side[0], cube.scale * side[1], cube.scale), 0.01)
    image = render(lit(cube, direction=sun))
    red = image[int((1 - v) / 2 * SIZE), int((1 + u) / 2 * SIZE), 0]
    lambert = 0.8 * (0.954 + 0.3 * 0.65)  # colour x (sun on the face + sky on an upright face)
    assert (red / 255) ** 2.2 == pytest.approx(lambert, rel=0.12)


def test_pictures_are_small_byte_images_that_brighten_with_the_sky():
    image = render(lit(thing("sphere")))
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    assert render(lit(thing("sphere"), ambient=0.6)).mean() > image.mean() + 5


@settings(max_examples=60, deadline=None)
@given(seeds, seeds)
def test_sampled_objects_stand_apart_in_the_frame_and_in_sight(seed, index):
    scene = sample_scene(seed, index)
    assert 3 <= len(scene.objects) <= 10
    _, ids, covered = trace(scene)
    for k, obj in enumerate(scene.objects):
        assert (ids == k).sum() >= max(MIN_PIXELS, 0.4 * covered[k])
        u, v, radius = scene.camera.project(obj.centre, obj.bound)
        assert max(abs(u), abs(v)) + radius <= 1
        for other in scene.objects[:k]:
            gap = math.dist((obj.x, obj.y), (other.x, other.y))
            assert gap > obj.footprint + other.footprint


@given(seeds, seeds)
@settings(max_examples=30, deadline=None)
def test_labels_answer_for_the_nearest_object(seed, index):
    scene = sample_scene(seed, index)
    eye = np.array(scene.camera.position)
    away = [np.linalg.norm(eye - [obj.x, obj.y, obj.scale]) for obj in scene.objects]
    nearest = int(np.argmin(away))
    assert labels(scene) == {
        "count": len(scene.objects) - 3,
        "distance": sum(away[nearest] >= edge for edge in DISTANCE_EDGES),
        "shape": SHAPES.index(scene.objects[nearest].shape),
    }


def test_classes_are_roughly_balanced():
    drawn = [labels(sample_scene(7, index)) for index in range(600)]
    for name, classes in (("count", 8), ("distance", 6), ("shape", 3)):
        share = np.bincount([label[name] for label in drawn], minlength=classes) / len(drawn)
        assert share.size == classes
        assert share.min() > 0.6 / classes and share.max() < 1.4 / classes, (name, share)


def test_the_world_is_a_function_of_seed_and_index():
    assert sample_scene(3, 4) == sample_scene(3, 4)
    assert example(3, 4) == example(3, 4)
    assert len({sample_scene(seed, index) for seed in range(3) for index in range(3)}) == 9


def test_the_world_has_not_changed():
    """Recorded labels: a change here needs a new version of the dataset."""
    drawn = [tuple(labels(sample_scene(0, index)).values()) for index in range(8)]
    expected = [
        (0, 0, 1),
        (7, 5, 2),
        (4, 1, 1),
        (0, 3, 1),
        (7, 4, 2),
        (3, 3, 0),
        (4, 4, 1),
        (6, 4, 2),
    ]
    assert drawn == expected


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    builder.prepare(folder, train=12, test=5, seed=2, workers=1, progress=False)
    return folder


def test_records_are_the_rendered_scenes_at_random_access(prepared):
    config = builder.scene_config(12, 5, 2)
    data = builder.Scenes(data_dir=prepared, config=config)
    train, test = (data.as_data_source(split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 5)
    for source, i, index in ((train, 9, 9), (train, 0, 0), (test, 4, builder.TEST_START + 4)):
        record, scene = source[i], sample_scene(2, index)
        np.testing.assert_array_equal(record.pop("image"), render(scene))
        assert record == {**labels(scene), "index": index}


def test_tfds_reads_it_by_name_and_leaves_images_encoded_on_request(prepared):
    source = tfds.data_source(
        "scenes/train12_test5_seed2",
        split="train[50%:]",
        data_dir=prepared,
        download=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    assert len(source) == 6
    with Image.open(io.BytesIO(source[1]["image"])) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), render(sample_scene(2, 7)))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.multiproc
def test_workers_do_not_change_a_byte(prepared, tmp_path):
    builder.prepare(tmp_path, train=12, test=5, seed=2, workers=2, progress=False)
    assert contents(tmp_path) == contents(prepared)
    assert any(path.suffix.startswith(".array_record") for path in contents(tmp_path))


def test_preparing_again_finds_it_and_other_sizes_lie_apart(tmp_path, monkeypatch):
    builder.prepare(tmp_path, train=2, test=1, workers=1, progress=False)
    before = contents(tmp_path)
    builder.prepare(tmp_path, train=3, test=1, workers=1, progress=False)
    after = contents(tmp_path)
    assert before.items() <= after.items() and len(after) > len(before)

    monkeypatch.setattr(builder, "example", None)  # rendering anything would now fail
    builder.prepare(tmp_path, train=2, test=1, workers=1, progress=False)
    assert contents(tmp_path) == after


def test_an_interrupted_preparation_is_not_taken_for_a_complete_one(tmp_path, monkeypatch):
    def interrupted(seed, index):
        if index == 2:
            raise KeyboardInterrupt
        return example(seed, index)

    monkeypatch.setattr(builder, "example", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builder.prepare(tmp_path, train=4, test=1, workers=1, progress=False)
    assert not list(tmp_path.rglob("*.array_record*"))

    # What a kill leaves behind: the folder under its temporary name.
    config = builder.scene_config(4, 1)
    (tmp_path / "scenes" / config.name / "incomplete.ABCDEF_2.0.0").mkdir(parents=True)
    monkeypatch.setattr(builder, "example", example)
    builder.prepare(tmp_path, train=4, test=1, workers=1, progress=False)
    source = builder.Scenes(data_dir=tmp_path, config=config).as_data_source(split="train")
    assert [source[i]["index"] for i in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "sizes", [{"train": 0}, {"test": 0}, {"train": builder.TEST_START + 1}, {"seed": -1}]
)
def test_impossible_sizes_are_refused_with_the_value(sizes, tmp_path):
    ((name, value),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        builder.prepare(tmp_path, **sizes)
    assert not list(tmp_path.iterdir())


def test_workers_start_without_tfds_or_jax():
    code = (
        "import sys, common.datasets.scenes.sample;"
        "print([m for m in ('tensorflow_datasets', 'tensorflow', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_script_without_a_main_guard_fails_with_the_remedy(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from common.datasets.scenes import builder\n"
        f"builder.prepare({str(tmp_path)!r}, train=9, test=1, workers=2, progress=False)\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode != 0
    assert '__name__ == "__main__"' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("*.array_record*"))
