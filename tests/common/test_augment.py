import pickle  # noqa: TID251  (what workers do, to objects of our own)

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common.augment import (
    MEAN,
    STD,
    CenterCrop,
    RandomResizedCrop,
    color_distortion,
    crop_box,
    crop_boxes,
    crop_on_device,
    normalize,
    random_resized_crop,
    resize_boxes,
)


def rng(seed=0):
    return np.random.default_rng(seed)


def photo(height, width, seed=0):
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SIDE = st.integers(1, 400)


@settings(deadline=None)
@given(SIDE, SIDE, st.floats(0.05, 1.0), st.integers(0, 1000))
def test_a_crop_lies_in_the_image_and_obeys_scale_and_ratio(width, height, smallest, seed):
    size, scale = (width, height), (smallest, 1.0)
    left, upper, right, lower = crop_box(size, rng(seed), scale, (3 / 4, 4 / 3))
    assert 0 <= left < right <= width and 0 <= upper < lower <= height
    w, h = right - left, lower - upper
    fits = 3 / 4 <= width / height <= 4 / 3
    if fits:  # the drawn box or the whole image; rounding each side moves the area a little
        assert (w + 1) * (h + 1) >= smallest * width * height
    assert (w + 1) / max(h - 1, 1e-9) >= 3 / 4 and (w - 1) / (h + 1) <= 4 / 3


def test_crops_that_never_fit_become_the_largest_central_one():
    assert crop_box((400, 30), rng(), (0.9, 1.0), (3 / 4, 4 / 3)) == (180, 0, 220, 30)
    assert crop_box((30, 400), rng(), (0.9, 1.0), (3 / 4, 4 / 3)) == (0, 180, 30, 220)


def test_crop_area_is_uniform_aspect_log_uniform_and_position_reaches_every_edge():
    g = rng()
    boxes = np.array([crop_box((1000, 1000), g, (0.1, 0.5), (0.5, 2.0)) for _ in range(4000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # area (0.1, 0.5): mean .3, sd .4 / sqrt(12); log aspect: mean 0, sd 2 log 2 / sqrt(12)
    assert abs((w * h / 1e6).mean() - 0.3) < 4 * 0.115 / 4000**0.5
    assert abs(np.log(w / h).mean()) < 4 * 0.4 / 4000**0.5
    assert abs(np.log(w / h).std() - 0.4) < 0.02
    where = boxes[:, 0] / (1000 - w)
    assert abs(where.mean() - 0.5) < 4 * 0.289 / 4000**0.5
    small = np.array([crop_box((4, 4), g, (0.25, 0.25), (1.0, 1.0)) for _ in range(200)])
    assert set(small[:, 0]) == set(small[:, 1]) == {0, 1, 2}  # the last start included


def test_resizing_sees_no_pixel_outside_the_crop():
    image = np.zeros((64, 64, 3), np.uint8)
    for seed in range(20):
        left, upper, right, lower = crop_box((64, 64), rng(seed), (0.3, 0.6), (3 / 4, 4 / 3))
        marked = np.full_like(image, 255)
        marked[upper:lower, left:right] = 0
        assert random_resized_crop(marked, rng(seed), 48, (0.3, 0.6)).max() == 0


def test_a_full_crop_is_pils_antialiased_bilinear_resize():
    image = photo(96, 96)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    got = random_resized_crop(image, rng(), 32, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_the_device_cuts_pils_pixels_out_of_a_given_box(size):
    height, width = 40, 56
    images = np.stack([photo(height, width, i) for i in range(24)])
    corners = np.sort(rng().integers(0, (width, height), (22, 2, 2)), axis=1)
    corners[:, 1] += 1
    boxes = np.concatenate([corners.reshape(-1, 4), [[0, 0, width, height], [3, 5, 4, 6]]])
    flips = np.arange(len(boxes)) % 3 == 0
    got = jax.jit(resize_boxes, static_argnums=3)(images, boxes.astype(np.float32), flips, size)
    for image, box, flip, found in zip(images, boxes.tolist(), flips, np.asarray(got)):
        crop = Image.fromarray(image).crop(box).resize((size, size), Image.Resampling.BILINEAR)
        expected = np.asarray(crop)[:, ::-1] if flip else np.asarray(crop)
        apart = np.abs(found.astype(int) - expected)
        assert apart.max() <= 2 and apart.mean() < 0.3, box


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), (0.3, 1.0)), ((56, 24), (0.6, 1.0)), ((400, 30), (0.9, 1.0))]
)
def test_boxes_of_the_device_are_distributed_as_the_hosts(size, scale):
    n, ratio = 8000, (3 / 4, 4 / 3)
    generator = rng()
    want = np.array([crop_box(size, generator, scale, ratio) for _ in range(n)])
    u = jax.random.uniform(jax.random.key(1), (n, 10, 4))
    got = np.asarray(jax.jit(crop_boxes, static_argnums=(0, 2, 3))(size, u, scale, ratio))
    assert (got == got.astype(int)).all()
    ours, theirs = ((b[:, 2:] - b[:, :2], b[:, :2]) for b in (got, want))
    for a, b in zip((*ours[0].T, *ours[1].T), (*theirs[0].T, *theirs[1].T)):
        values = np.union1d(a, b)
        apart = [(a <= v).mean() - (b <= v).mean() for v in values]
        assert np.abs(apart).max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov and Smirnov, at .001


def test_the_device_crops_each_image_by_its_own_key_and_flips_half():
    images = np.stack([photo(12, 12, i) for i in range(200)])
    keys = jax.random.split(jax.random.key(0), len(images))
    whole = RandomResizedCrop(12, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    crop = jax.jit(crop_on_device, static_argnums=0)
    got = np.asarray(crop(whole, images, keys))
    as_it_was, mirrored = ((got == x).all((1, 2, 3)) for x in (images, images[:, :, ::-1]))
    assert (as_it_was | mirrored).all() and 70 < mirrored.sum() < 130
    part = RandomResizedCrop(8)
    alone = crop(part, images[5:7], keys[5:7])
    np.testing.assert_array_equal(crop(part, images, keys)[5:7], alone)


def test_the_same_generator_state_gives_the_same_image():
    transform = RandomResizedCrop(24, flip=True, color=0.5, blur=True)
    record = {"image": photo(40, 50), "label": 3}
    one, two, other = (transform(record, rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one["image"], two["image"])
    assert (one["image"] != other["image"]).any()
    assert one["label"] == 3 and one["image"].shape == (24, 24, 3)
    assert one["image"].dtype == np.uint8


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    image = photo(16, 16)
    transform = RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
    outputs = [transform({"image": image}, rng(seed))["image"] for seed in range(200)]
    mirrored = [bool((out == image[:, ::-1]).all()) for out in outputs]
    plain = [bool((out == image).all()) for out in outputs]
    assert sum(mirrored) + sum(plain) == 200
    assert 70 <= sum(mirrored) <= 130  # 4 sigma


def test_blur_smooths_half_of_the_images():
    image = photo(32, 32)
    transform = RandomResizedCrop(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), blur=True)
    outputs = [transform({"image": image}, rng(seed))["image"] for seed in range(200)]
    changed = [out for out in outputs if (out != image).any()]
    assert 60 <= len(changed) <= 130  # radii near 0.1 change nothing
    assert all(out.std() <= image.std() for out in changed)


def test_color_distortion_greys_a_fifth_and_leaves_a_few_untouched():
    image = photo(8, 8)
    outputs = [color_distortion(image, rng(seed), 0.5) for seed in range(400)]
    grey = sum(bool((out == out[..., :1]).all()) for out in outputs)
    untouched = sum(bool((out == image).all()) for out in outputs)
    assert 48 <= grey <= 112  # .2, 4 sigma
    assert 36 <= untouched <= 92  # .2 * .8


def test_hue_turns_but_keeps_value():
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = 200  # pure red: brightness factors aside, only hue can move it to green or blue
    outputs = [color_distortion(image, rng(seed), 2.0) for seed in range(60)]
    assert any(out[0, 0, 1] > out[0, 0, 0] for out in outputs)
    assert any(out[0, 0, 2] > out[0, 0, 0] for out in outputs)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (224, 224), (30, 500)])
def test_center_crop_takes_the_middle_at_imagenets_margin(shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 255
    out = CenterCrop(64)({"image": image}, rng())["image"].astype(float)[..., 0]
    assert out.shape == (64, 64)
    centre = np.array([(out.sum(1 - axis) * np.arange(64)).sum() / out.sum() for axis in (0, 1)])
    np.testing.assert_allclose(centre, 31.5, atol=1.0)


def test_center_crop_resizes_the_short_side_and_leaves_fitting_images_alone():
    image = photo(32, 32)
    np.testing.assert_array_equal(CenterCrop(32, 32)({"image": image}, rng())["image"], image)
    tall = photo(64, 48)
    expected = np.asarray(Image.fromarray(tall).resize((24, 32), Image.Resampling.BILINEAR))
    got = CenterCrop(24, 24)({"image": tall}, rng())["image"]
    np.testing.assert_array_equal(got, expected[4:28])


def test_normalize_centres_imagenet_pixels():
    x = np.stack([np.round(MEAN * 255), np.round((MEAN + STD) * 255)]).astype(np.uint8)
    out = jax.jit(normalize)(x)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, [[0] * 3, [1] * 3], atol=0.5 / 255 / STD.min() + 1e-5)
    exact = (photo(5, 5) / 255.0 - MEAN) / STD
    np.testing.assert_allclose(normalize(photo(5, 5)), exact, rtol=1e-4, atol=1e-5)


def test_transforms_pickle_and_name_every_setting():
    for transform in (RandomResizedCrop(32, flip=True), CenterCrop(32)):
        assert pickle.loads(pickle.dumps(transform)) == transform
    assert repr(RandomResizedCrop(32)) != repr(RandomResizedCrop(32, scale=(0.2, 1.0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomResizedCrop(0),
        lambda: RandomResizedCrop(32, scale=(0.5, 0.3)),
        lambda: RandomResizedCrop(32, scale=(0.0, 1.0)),
        lambda: RandomResizedCrop(32, ratio=(2.0, 1.0)),
        lambda: RandomResizedCrop(32, color=3.0),
        lambda: CenterCrop(32, resize=31),
    ],
)
def test_settings_out_of_range_are_refused_when_made(make):
    with pytest.raises(ValueError, match=r"RandomResizedCrop|CenterCrop"):
        make()


def test_other_than_uint8_rgb_is_refused_by_shape():
    with pytest.raises(ValueError, match=r"float32 \[8, 8, 3\]"):
        random_resized_crop(np.zeros((8, 8, 3), np.float32), rng(), 4)
    with pytest.raises(ValueError, match=r"uint8 \[8, 8, 1\]"):
        random_resized_crop(np.zeros((8, 8, 1), np.uint8), rng(), 4)
