"""Image files of every kind become the RGB values that they mean, or are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data import open_source
from common.images import UnreadableImage, decode_image, printable


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind="PNG", **options):
    return decode_image(encode(image, kind, **options), "x")


RAMP = np.arange(0, 65536, 257 * 15, dtype=np.uint16).reshape(2, 9)  # 8-bit values 0, 15, ..., 255


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(kind):
    array = decoded(Image.fromarray(RAMP), kind)
    assert array.shape == (2, 9, 3) and array.dtype == np.uint8
    np.testing.assert_array_equal(array[..., 0].ravel(), np.arange(18) * 15)
    assert (array == array[..., :1]).all()


def test_sixteen_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    assert decoded(Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255]


def tiff(pixels, width, height, bits, order):
    """A TIFF of grey pixels in one strip; `order` is "<" or ">"."""
    entries = [
        (256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (278, height), (279, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack(order + "H", len(entries))
    for tag, value in entries:
        directory += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + directory + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_of_sixteen_bits_in_either_order(order):
    array = decode_image(tiff(RAMP.astype(order + "u2").tobytes(), 9, 2, 16, order), "x")
    np.testing.assert_array_equal(array[..., 1].ravel(), np.arange(18) * 15)


def test_twelve_bits_are_scaled_by_theirs():
    pixels = bytes([0xFF, 0xF0, 0x00, 0x80, 0x80, 0x00])  # 4095, 0, 2056, 0
    assert decode_image(tiff(pixels, 4, 1, 12, "<"), "x")[0, :, 0].tolist() == [255, 0, 128, 0]


def test_a_colour_png_of_sixteen_bits():
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    line = b"\0" + np.array([0, 257 * 77, 65535], ">u2").tobytes()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    assert decode_image(png, "x").tolist() == [[[0, 77, 255]]]


def test_a_grey_pgm_of_sixteen_bits():
    pgm = b"P5 3 1 65535\n" + np.array([0, 257 * 100, 65535], ">u2").tobytes()
    assert decode_image(pgm, "x")[0, :, 2].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    ("dtype", "words"), [(np.float32, "floating-point"), (np.int32, "32-bit integer")]
)
def test_numbers_of_unknown_range_are_refused_by_name(dtype, words):
    tiff = encode(Image.fromarray(np.full((2, 2), 3, dtype)), "TIFF")
    with pytest.raises(UnreadableImage, match=f"a/b.tif cannot be decoded .*{words}.*8 bits"):
        decode_image(tiff, "a/b.tif")


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)])
    expected = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    assert decoded(image)[0].tolist() == expected
    assert decoded(image, "TIFF")[0].tolist() == expected
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    assert decoded(grey)[0].tolist() == [[10] * 3, [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putdata([0, 1])
    assert decoded(palette)[0].tolist() == [[9, 8, 7], [1, 2, 3]]
    assert decoded(palette, transparency=1)[0].tolist() == [[9, 8, 7], [255] * 3]
    assert decoded(palette, transparency=b"\xff\x00")[0].tolist() == [[9, 8, 7], [255] * 3]


def test_other_modes():
    one_bit = Image.new("1", (2, 1))
    one_bit.putdata([0, 255])
    assert decoded(one_bit)[0].tolist() == [[0] * 3, [255] * 3]
    assert decoded(Image.new("L", (1, 1), 77))[0].tolist() == [[77] * 3]
    ink = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert decoded(ink, "TIFF")[0].tolist() == [[255, 0, 0]]
    np.testing.assert_allclose(decoded(ink, "JPEG", quality=95)[0], [[255, 0, 0]], atol=3)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_images_are_turned_as_their_exif_entry_says(kind, tmp_path):
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: to be turned by a quarter, clockwise
    encoded = encode(Image.fromarray(np.rot90(upright).copy()), kind, exif=exif)
    np.testing.assert_array_equal(decode_image(encoded, "x"), upright)
    (tmp_path / "a.img").write_bytes(encoded)
    np.testing.assert_array_equal(open_source(f"folder:{tmp_path}")[0]["image"], upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's
def test_a_damaged_exif_entry_is_no_reason_to_lose_an_image():
    image = Image.new("RGB", (2, 2), (50, 60, 70))
    encoded = encode(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    np.testing.assert_allclose(decode_image(encoded, "x")[0, 0], [50, 60, 70], atol=2)


def test_an_error_is_one_line():
    with pytest.raises(UnreadableImage) as error:
        decode_image(b"nothing", "x.png")
    assert str(error.value).startswith("x.png cannot be decoded (not an image): repair or remove")
    assert "--config.data.skip_bad=true" in str(error.value) and "\n" not in str(error.value)


def test_names_are_printable():
    assert printable("caf\udce9/a\nb.png") == "caf\\xe9/a\\nb.png"
    assert printable("Größe 猫.png") == "Größe 猫.png"
