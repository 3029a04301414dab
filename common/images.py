"""From an image file's bytes to uint8 RGB, for every kind of image; and the message where that fails."""

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SKIP_ADVICE = (
    "go on without it (skip_bad: --config.data.skip_bad=true in training, --skip_bad in "
    "`python -m common.data info`)"
)

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_SCALED_TO_SIXTEEN = ("PNG", "PPM")  # formats whose mode "I" holds 0..65535, whatever was stored
_ORIENTATION = 0x0112  # EXIF tag
_BITS = 258  # TIFF tag, of bits a sample


class ImageError(ValueError):
    """One line on an image that could not be read, and the remedy."""


class UnreadableFile(ImageError):
    """A file that was there when its folder was opened, and now is not, or whose storage fails."""


class UnreadableImage(ImageError):
    """An image that cannot be decoded: one line with the problem, which names it, and the remedy."""

    def __init__(self, problem: str, remedy: str = f"repair or remove it, or {SKIP_ADVICE}"):
        super().__init__(problem, remedy)
        self.problem = problem

    def __str__(self) -> str:
        return ": ".join(self.args)


def decode_image(encoded: bytes, name: str) -> np.ndarray:
    """An encoded image as read-only uint8 [H, W, 3].

    Turned upright as its EXIF entry says. Grey becomes RGB; 16 bits a channel become 8 by their range,
    0 to 65535 (in a TIFF of 12 bits to 4095), rounded; what is transparent is laid on white; CMYK goes
    by PIL's plain formula.

    Args:
      name: what an error calls it.

    Raises:
      UnreadableImage: it is damaged or no image, or holds numbers whose range is not known (float
        or 32-bit integers).
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            array = _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise many kinds on malformed files
        raise unreadable(name, error) from error
    array.flags.writeable = False
    return array


def unreadable(name: str, why: object) -> UnreadableImage:
    """The error for an image that cannot be decoded."""
    if isinstance(why, Image.UnidentifiedImageError):
        why = "not an image"  # PIL's own words name a memory address
    reason = printable(" ".join(str(why).split())) or type(why).__name__
    return UnreadableImage(f"{name} cannot be decoded ({reason})")


def printable(name: str) -> str:
    """A file's name as one line of text: bytes that are not UTF-8 and control characters become escapes."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _to_rgb(image: Any) -> np.ndarray:
    image.load()  # before the mode is looked at: some plugins know it only then
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    mode = image.mode
    if mode in _SIXTEEN_BITS or (mode == "I" and image.format in _SCALED_TO_SIXTEEN):
        twelve = getattr(image, "tag_v2", {}).get(_BITS) == (12,)  # PIL reads these as they are
        top = 4095 if twelve else 65535
        gray = np.asarray(image).astype(np.uint32)
        gray = ((gray * 255 + top // 2) // top).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if mode[0] in "IF":
        kind = "floating-point" if mode[0] == "F" else "32-bit integer"
        raise ValueError(f"mode {mode}: {kind} pixels have no known range; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Any) -> int:
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing of the pixels
        return 1
    return turn if turn in range(2, 9) else 1
