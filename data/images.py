"""From the bytes of an image file to the pixels a model sees.

The host decodes, crops and resizes to uint8; the device flips, jitters, blurs and normalises a whole
batch at once.  Evaluation uses `eval_image` (or `squash_image` for triplets) and `normalise`.

B batch, S image side.  Pixels are uint8 0..255 on the host and floats 0..1 inside the device part.
"""

import io
import struct
import zlib

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, in 0..1 (Radford et al. 2021)
STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow knows some forty formats, and for a few of them (EPS) it starts other programs.  Only these
# are opened, whatever the file's name says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a gigabyte in RGB
MAX_ASPECT = 100  # long side / short side; beyond it a resize of the short side to S fills memory
# What Pillow's decoders raise on broken bytes, found by damaging files at random (tests/test_images.py)
DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
                  struct.error, zlib.error, Image.DecompressionBombError)
# EXIF orientation -> what undoes it (EXIF 2.3, tag 0x0112); 1 is upright
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


class BadImage(ValueError):
    """These bytes hold no usable picture; `reason` is a short phrase that can be counted."""

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------- host: bytes to RGB

def open_image(data):
    """Read the header only: bytes -> PIL image whose pixels are not decoded yet.

    Raises BadImage: "empty", "not an image", "broken header", "too large", "absurd shape".
    """
    if not data:
        raise BadImage("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except DECODER_ERRORS:
        known = data.startswith(SIGNATURES)
        raise BadImage("broken header" if known else "not an image") from None
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS:  # refused before a pixel is decoded
        raise BadImage("too large")
    if long > MAX_ASPECT * short or long == 1:
        raise BadImage("absurd shape")
    return image


def decode(data):
    """Bytes -> upright PIL image in mode RGB.

    Alpha is laid on white, 16 bits are scaled to 8, an animation gives its first frame, and an EXIF
    block that cannot be read counts as upright.  Raises BadImage: those of `open_image`, "truncated",
    "corrupt" and "unknown pixel format".
    """
    return load_rgb(open_image(data))


def load_rgb(image):
    """The second half of `decode`: a freshly opened PIL image -> upright RGB."""
    try:
        image.load()
    except DECODER_ERRORS as error:
        cut = "truncated" in str(error) or isinstance(error, EOFError)
        raise BadImage("truncated" if cut else "corrupt") from None
    turn = UPRIGHT.get(_orientation(image))
    image = _to_rgb(image)
    return image if turn is None else image.transpose(turn)


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except DECODER_ERRORS:  # the pixels are fine: a broken note about them is no reason to lose them
        return 1


def _to_rgb(image):
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey; 257 takes 65535 to 255 exactly
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # nothing says which value is white
        raise BadImage("unknown pixel format")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


# ---------------------------------------------------------------- host: evaluation

def eval_image(image, size):
    """PIL RGB image -> (3, S, S) uint8: shorter side to S, bicubic, then the centre.

    Every bit as in CLIP's own evaluation (EVALUATION: torchvision Resize + CenterCrop in Pillow form).
    """
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = int(round((width - size) / 2.0))
    top = int(round((height - size) / 2.0))
    return _to_tensor(image.crop((left, top, left + size, top + size)))


def squash_image(image, size):
    """PIL RGB image -> (3, S, S) uint8: both sides to S, bicubic, nothing cut away (triplets)."""
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def _to_tensor(image):
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).contiguous()  # (3, H, W)


# ---------------------------------------------------------------- device

def normalise(images):
    """uint8 (B, 3, S, S) -> float32 of the same shape, with CLIP's mean and standard deviation."""
    return _standardise(images.float() / 255)


def _standardise(pixels):
    # built on the host and moved without waiting: inside a compiled function they are constants
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std
