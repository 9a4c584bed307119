"""From the bytes of an image file to the pixels that a model sees.

The host decodes, crops and resizes to uint8; the device flips, jitters, blurs and normalises a
whole batch at once. Evaluation takes `eval_image` (triplets: `squash_image`) and `normalise`.

B batch, S image side. Pixels are uint8 from 0 to 255, inside the device part floats from 0 to 1.
"""
import io
import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Pillow warns of each oddity of a file; here they are counted by reason, or mended.
warnings.filterwarnings("ignore", module="PIL")

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels (arXiv 2103.00020's code)
STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow knows some forty formats, and for a few of them (EPS) starts other programs. These only are
# opened, whatever a file's name says; a file that begins like one of them is damaged, not foreign.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a gigabyte as RGB
MAX_ASPECT = 100  # long side / short side: with the short side at 224 the other is 22,400 already
# The first four came out of Pillow when 270,000 files were damaged at random; the others are what
# Pillow itself takes for a damaged header.
DECODER_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError,
                  EOFError, IndexError, TypeError, struct.error)
ORIENTATION = 0x0112  # EXIF tag; below, its values but 1 (upright) and what undoes them
UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
           4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
           6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, in this order. The defaults are plain CLIP's."""

    crop: tuple = (0.9, 1.0)      # random resized crop: share of the area, uniform
    ratio: tuple = (3 / 4, 4 / 3)  # and width / height, log-uniform
    flip: float = 0.0             # probability of a horizontal flip
    # reaches of brightness, contrast, saturation (factors 1 - reach to 1 + reach) and hue (turns)
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0         # probability of the jitter
    grey_p: float = 0.0           # probability of greyscale
    blur_p: float = 0.0           # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)  # pixels, uniform


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
    block that cannot be read counts as upright. Raises BadImage: those of `open_image`,
    "truncated", "corrupt" and "unknown pixel format".
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
        return image.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:  # a broken note about good pixels is no reason to lose them
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

    Bit for bit torchvision's Resize and CenterCrop of a Pillow image, as CLIP is evaluated with.
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


# ---------------------------------------------------------------- host: training

def train_image(data, size, augmentation, rng):
    """Bytes -> (3, S, S) uint8: a random crop of the upright image, resized (bicubic, antialiased).

    torch's uint8 resize takes a third of Pillow's time and differs by at most 2 grey levels. Raises
    BadImage as `decode` does.
    """
    image = open_image(data)
    turned = _orientation(image) >= 5  # on its side until load_rgb
    width, height = image.size[::-1] if turned else image.size
    box = crop_box(width, height, augmentation.crop, augmentation.ratio, rng)
    shrunk = _skip_detail(image, min(box[2] - box[0], box[3] - box[1]) / size)
    left, top, right, bottom = (round(edge / shrunk) for edge in box)
    pixels = torch.from_numpy(np.array(load_rgb(image)))              # (H, W, 3), maybe shrunk
    crop = pixels[top:bottom, left:right].permute(2, 0, 1)[None]      # (1, 3, h, w)
    return F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]


def crop_box(width, height, area, ratio, rng):
    """(left, top, right, bottom) of torchvision's RandomResizedCrop, in pixels.

    Ten tries at a share of the area, uniform, and a width / height, log-uniform; a crop that does
    not fit is drawn again. Then the centre, cut to the nearest ratio allowed.
    """
    for _ in range(10):
        share, shape, x, y = rng.random(4).tolist()
        pixels = width * height * _between(*area, share)
        aspect = math.exp(_between(*map(math.log, ratio), shape))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _skip_detail(image, times_too_large):
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 where twice the detail needed remains; return 2, 4, 8.

    A decoder that skips the finest coefficients is several times faster on camera pictures. The
    rest is resized with antialiasing: on 1/f noise the result differs by 0.8 grey levels in the
    mean, on drawn shapes by 0.1, and with less than twice the detail by up to 5. Edges of the crop
    move to multiples of 2, 4 or 8 pixels, at most a quarter of a pixel of the result.
    """
    shrink = next((s for s in (8, 4, 2) if times_too_large >= 2 * s), 1)
    if image.format != "JPEG" or shrink == 1:
        return 1
    image.draft(None, (image.width // shrink, image.height // shrink))
    return shrink


# ---------------------------------------------------------------- device

# Columns of the drawn parameters (B, 11). Without an operation its column says "nothing".
FLIP, GREY, SIGMA, BRIGHTNESS, HUE, ORDER, DRAWS = 0, 1, 2, 3, 6, 7, 11
BLUR_REACH = 11  # 23 taps, as SimCLR has them at 224 pixels; at sigma 2 the rest weighs 1e-8


def draw_augmentation(augmentation, rng):
    """Draw one sample's device parameters -> (11,) float32.

    flip, grey (0 or 1), blur sigma (0: none), factors of brightness, contrast and saturation, hue
    shift in turns, and the order in which these four are applied (torchvision's ColorJitter).
    """
    u = rng.random(13).tolist()  # always as many, so that no probability moves another's draws
    draws = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    draws[FLIP] = u[0] < augmentation.flip
    draws[GREY] = u[1] < augmentation.grey_p
    if u[2] < augmentation.blur_p:
        draws[SIGMA] = _between(*augmentation.blur_sigma, u[3])
    if u[4] < augmentation.jitter_p:
        *reaches, turns = augmentation.jitter
        draws[BRIGHTNESS:HUE] = [_between(max(0, 1 - reach), 1 + reach, v)
                                 for reach, v in zip(reaches, u[5:8])]
        draws[HUE] = _between(-turns, turns, u[8])
    return np.array(draws + sorted(range(4), key=u[9:].__getitem__), np.float32)


def _between(low, high, share):
    return low + share * (high - low)


def augment_batch(images, draws, augmentation):
    """Flip, jitter, grey, blur and normalise: uint8 (B, 3, S, S), draws (B, 11) -> float32.

    Runs where images lie, as one batch without waiting for the device, and compiles. Operations
    that `augmentation` never uses are left out; None normalises only.
    """
    used = augmentation or Augmentation()  # whose device part is empty
    pixels = images.float() / 255
    # lerp chooses by a weight of 0 or 1, exactly; on a CPU it takes a tenth of torch.where's time
    if used.flip:
        pixels = torch.lerp(pixels, pixels.flip(-1), _column(draws, FLIP))
    if used.jitter_p and any(used.jitter):
        pixels = _jitter(pixels, draws)
    if used.grey_p:
        pixels = torch.lerp(pixels, _grey(pixels).expand_as(pixels), _column(draws, GREY))
    if used.blur_p:
        blurred = (_column(draws, SIGMA) > 0).float()
        pixels = torch.lerp(pixels, _blur(pixels, draws[:, SIGMA]), blurred)
    return _standardise(pixels)


def normalise(images):
    """uint8 (B, 3, S, S) -> float32 of the same shape, by CLIP's mean and standard deviation."""
    return _standardise(images.float() / 255)


def _standardise(pixels):  # numbers instead of a tensor of three: no copy to the device, no wait
    return torch.cat([(pixels[:, c:c + 1] - MEAN[c]) / STD[c] for c in range(3)], 1)


def _column(draws, index):
    return draws[:, index].view(-1, 1, 1, 1)                          # (B, 1, 1, 1)


def _grey(pixels):  # ITU-R 601-2 luma, as Pillow and torchvision have it
    red, green, blue = pixels.split(1, 1)                             # (B, 1, S, S) each
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _jitter(pixels, draws):
    """Brightness (0), contrast (1), saturation (2) and hue (3) in each sample's own order.

    The first three are one formula, a blend with black, with the mean grey, with the pixel's grey;
    so a slot computes one blend and one hue shift, and each sample takes what its order says.
    """
    for slot in range(ORDER, DRAWS):
        factor = draws.gather(1, draws[:, slot:slot + 1].long() + BRIGHTNESS)
        factor = factor.view(-1, 1, 1, 1)                             # (B, 1, 1, 1), as the next
        contrast, saturation, hue = ((_column(draws, slot) == k).float() for k in (1, 2, 3))
        grey = _grey(pixels)                                          # (B, 1, S, S)
        other = contrast * grey.mean((2, 3), keepdim=True) + saturation * grey
        blend = torch.lerp(other.expand_as(pixels), pixels, factor).clamp(0, 1)
        pixels = torch.lerp(blend, _shift_hue(pixels, factor), hue)
    return pixels


def _shift_hue(pixels, turns):
    """Turn the hue (HSV) of (B, 3, S, S) by (B, 1, 1, 1) turns."""
    red, green, blue = pixels.split(1, 1)                             # (B, 1, S, S) each
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # hue in sixths of a turn, times spread: red 0, green 2, blue 4, whichever is largest
    hue = torch.lerp(red - green + 4 * spread, blue - red + 2 * spread, (value == green).float())
    hue = torch.lerp(hue, green - blue, (value == red).float())
    sixths = hue / spread.clamp(min=1e-9) + 6 * turns  # grey has spread 0: any hue will do
    # Back: round the circle of six a channel is full for two, falls, is empty for two, and rises.
    away = [sixths + n - 6 * torch.floor((sixths + n) / 6) - 3 for n in (6, 4, 2)]
    return torch.cat([value - spread * (2 - far.abs()).clamp(0, 1) for far in away], 1)


def _blur(pixels, sigma):
    """Gaussian blur of (B, 3, S, S) with (B,) sigmas in pixels, reflected at the borders."""
    B, _, S, _ = pixels.shape
    reach = min(BLUR_REACH, S - 1)
    steps = torch.arange(-reach, reach + 1, device=pixels.device)
    taps = torch.softmax(-0.5 * (steps / sigma.clamp(min=0.05)[:, None])**2, 1)    # (B, T)
    taps = taps[:, None].expand(B, 3, -1).reshape(3 * B, 1, -1, 1)                 # (3B, 1, T, 1)
    planes = F.pad(pixels, (reach,) * 4, mode="reflect").flatten(0, 1)[None]       # (1, 3B, ., .)
    for kernel in (taps, taps.transpose(2, 3)):  # down, then across
        planes = F.conv2d(planes, kernel, groups=3 * B)
    return planes.reshape(B, 3, S, S)
