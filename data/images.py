"""From the bytes of an image file to the pixels that a model sees.

The host decodes, crops and resizes to uint8; the device flips, jitters, blurs and normalises a
whole batch at once. Evaluation takes `eval_image` (triplets: `squash_image`) and `normalise`.

B batch, S image side. Pixels are uint8 from 0 to 255, within the device part floats up to 1.
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
from torch.utils.data import Dataset

# Pillow warns of each oddity of a file; here they are counted by reason, or mended.
warnings.filterwarnings("ignore", module="PIL")

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pixels (OpenAI's code)
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # for some others it starts programs
MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a gigabyte as RGB
MAX_ASPECT = 100  # long side / short side
DECODER_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError,
                  IndexError, TypeError, struct.error)  # Pillow's, at damaged files
ORIENTATION = 0x0112  # EXIF tag; its values but 1, which is upright, and what undoes them
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
    # reaches of brightness, contrast, saturation (factors 1 -+ reach) and hue (turns)
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)
    jitter_p: float = 0.0         # probability of the jitter
    grey_p: float = 0.0           # probability of greyscale
    blur_p: float = 0.0           # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)  # pixels, uniform

    def __post_init__(self):
        for name, count in (("crop", 2), ("ratio", 2), ("jitter", 4), ("blur_sigma", 2)):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name}={getattr(self, name)}: must be {count} numbers")
        for name in ("flip", "jitter_p", "grey_p", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: is a share, from 0 to 1")
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"crop={self.crop}: two shares of the area, the smaller one first")


class BadImage(ValueError):
    """These bytes hold no usable picture; its text is a short phrase that can be counted."""


# ---------------------------------------------------------------- host: bytes to RGB

def open_image(data):
    """Bytes -> PIL image whose pixels are not decoded yet, or BadImage."""
    if not data:
        raise BadImage("empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("too large") from None
    except DECODER_ERRORS:
        raise BadImage("not an image") from None
    short, long = sorted(image.size)
    if short * long > MAX_PIXELS:  # refused before a pixel is decoded
        raise BadImage("too large")
    if long > MAX_ASPECT * short or long == 1:
        raise BadImage("absurd shape")
    return image


def decode(data):
    """Bytes -> upright PIL image in mode RGB. Raises BadImage, as its two halves do."""
    return load_rgb(open_image(data))


def load_rgb(image):
    """PIL image -> upright 8-bit RGB, alpha on white, the first frame only; or BadImage."""
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
    if image.mode == "F":  # nothing says which value is white
        raise BadImage("unknown pixel format")
    if image.mode.startswith("I"):  # 16-bit grey; 257 takes 65535 to 255 exactly
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------- host: to (3, S, S)

class Pixels(Dataset):
    """Pictures as evaluation reads them: anything with a length and image(i) -> Pillow RGB."""

    def __init__(self, pictures, size):
        self.pictures, self.size = pictures, size

    def __len__(self):
        return len(self.pictures)

    def __getitems__(self, numbers):
        """uint8 (b, 3, S, S) of these pictures."""
        return torch.stack([eval_image(self.pictures.image(i), self.size) for i in numbers])


def eval_image(image, size):
    """PIL RGB image -> (3, S, S) uint8: torchvision's Resize (bicubic) and CenterCrop."""
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = int(round((width - size) / 2.0))
    top = int(round((height - size) / 2.0))
    return _to_tensor(image.crop((left, top, left + size, top + size)))


def squash_image(image, size):
    """PIL RGB image -> (3, S, S) uint8: both sides to S, bicubic, nothing cut (triplets)."""
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def _to_tensor(image):
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).contiguous()  # (3, H, W)


def train_image(data, size, augmentation, rng):
    """Bytes -> (3, S, S) uint8: a random crop of the upright image, resized; or BadImage."""
    image = open_image(data)
    width, height = image.size
    if _orientation(image) >= 5:  # lies on its side until load_rgb
        width, height = height, width
    box = crop_box(width, height, augmentation.crop, augmentation.ratio, rng)
    shrunk = _skip_detail(image, min(box[2] - box[0], box[3] - box[1]) / size)
    crop = load_rgb(image).crop([round(edge / shrunk) for edge in box])
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    # takes a third of Pillow's time, and differs by at most 2 grey levels
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]


def crop_box(width, height, area, ratio, rng):
    """torchvision's RandomResizedCrop as (left, top, right, bottom) in pixels."""
    narrowest, widest = ratio
    for _ in range(10):
        share, shape, x, y = rng.random(4).tolist()
        pixels = width * height * _between(area[0], area[1], share)
        aspect = math.exp(_between(math.log(narrowest), math.log(widest), shape))
        w = round(math.sqrt(pixels * aspect))
        h = round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(x * (width - w + 1))
            top = int(y * (height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * widest))  # none fits: the centre, cut to the nearest ratio
    h = min(height, round(width / narrowest))
    left = (width - w) // 2
    top = (height - h) // 2
    return left, top, left + w, top + h


def _skip_detail(image, times_too_large):
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 if twice the detail remains: 2, 4, 8, else 1."""
    for shrink in (8, 4, 2):
        if image.format == "JPEG" and times_too_large >= 2 * shrink:
            image.draft(None, (image.width // shrink, image.height // shrink))
            return shrink
    return 1


# ---------------------------------------------------------------- device

# Columns of a sample's draws
FLIP, GREY, SIGMA, BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER = range(8)
DRAWS = 11       # the order of the jitter takes the last four
BLUR_REACH = 11  # pixels: 23 taps, as SimCLR has them at 224 pixels


def draw_augmentation(augmentation, rng):
    """Draw one sample's device parameters -> (11,) float32.

    flip, grey (0 or 1), blur sigma, factors of brightness, contrast, saturation, hue in turns,
    order of these four. What was not drawn has the value that changes nothing.
    """
    u = rng.random(13).tolist()  # always as many, so that no probability moves another's draws
    draws = np.zeros(DRAWS, np.float32)
    draws[FLIP] = u[0] < augmentation.flip
    draws[GREY] = u[1] < augmentation.grey_p
    if u[2] < augmentation.blur_p:
        draws[SIGMA] = _between(*augmentation.blur_sigma, u[3])
    draws[BRIGHTNESS:HUE] = 1
    if u[4] < augmentation.jitter_p:
        for i, reach in enumerate(augmentation.jitter[:3]):
            draws[BRIGHTNESS + i] = _between(max(0, 1 - reach), 1 + reach, u[5 + i])
        draws[HUE] = _between(-augmentation.jitter[3], augmentation.jitter[3], u[8])
    draws[ORDER:] = np.argsort(u[9:])
    return draws


def _between(low, high, share):
    return low + share * (high - low)


def augment_batch(images, draws, augmentation):
    """Flip, jitter, grey, blur and normalise: uint8 (B, 3, S, S), draws (B, 11) -> float32.

    Runs where images lie and compiles; operations that `augmentation` never uses are left out.
    """
    pixels = images.float() / 255
    if augmentation.flip:
        pixels = _choose(draws[:, FLIP, None, None, None], pixels.flip(-1), pixels)
    if augmentation.jitter_p and any(augmentation.jitter):
        pixels = _jitter(pixels, draws)
    if augmentation.grey_p:
        grey = _grey(pixels).expand_as(pixels)
        pixels = _choose(draws[:, GREY, None, None, None], grey, pixels)
    if augmentation.blur_p:
        pixels = _blur(pixels, draws[:, SIGMA])
    return _standardise(pixels)


def normalise(images):
    """uint8 (B, 3, S, S) -> float32 (B, 3, S, S), by CLIP's mean and standard deviation."""
    return _standardise(images.float() / 255)


def _standardise(pixels):  # with numbers, not a tensor of three: no copy to the device
    return torch.cat([(pixels[:, c:c + 1] - MEAN[c]) / STD[c] for c in range(3)], 1)


def _choose(condition, one, other):
    """torch.where: exact too, as the weight is 0 or 1, and on a CPU ten times faster."""
    return torch.lerp(other, one, condition.float())


def _grey(pixels):  # ITU-R 601-2 luma, as Pillow and torchvision have it
    red, green, blue = pixels.split(1, 1)                             # (B, 1, S, S) each
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _jitter(pixels, draws):
    """Brightness, contrast, saturation and hue, in each sample's own order (ColorJitter).

    The first three move pixels towards a target (factor below 1) or away: black for brightness,
    the mean grey for contrast, the pixel's grey for saturation. Each step does both this and
    the hue to all samples, and each sample keeps what its order says.
    """
    for step in range(ORDER, DRAWS):
        operation = BRIGHTNESS + draws[:, step:step + 1].long()       # (B, 1): its column
        factor = draws.gather(1, operation).view(-1, 1, 1, 1)         # hue's is in turns
        operation = operation.view(-1, 1, 1, 1)
        grey = _grey(pixels)                                          # (B, 1, S, S)
        mean_grey = grey.mean((2, 3), keepdim=True)                   # (B, 1, 1, 1)
        target = mean_grey * (operation == CONTRAST) + grey * (operation == SATURATION)
        moved = torch.lerp(target.expand_as(pixels), pixels, factor).clamp(0, 1)
        pixels = _choose(operation == HUE, _shift_hue(pixels, factor), moved)
    return pixels


def _shift_hue(pixels, turns):
    """Turn the hue (HSV) of (B, 3, S, S) by (B, 1, 1, 1) turns."""
    red, green, blue = pixels.split(1, 1)                             # (B, 1, S, S) each
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    # Hue in sixths of a turn: about 0 where red is largest, 2 where green, 4 where blue is.
    divisor = spread.clamp(min=1e-9)  # grey has spread 0: any hue will do
    hue = _choose(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = _choose(value == red, (green - blue) / divisor, hue)
    hue = hue + 6 * turns
    # Back: a channel falls for a sixth, is lowest for two, rises for one, is highest for two.
    channels = []
    for offset in (5, 3, 1):  # red falls from 1 to 2, green from 3 to 4, blue from 5 to 6
        along = (hue + offset) % 6
        channels.append(value - spread * torch.minimum(along, 4 - along).clamp(0, 1))
    return torch.cat(channels, 1)                                     # (B, 3, S, S)


def _blur(pixels, sigma):
    """Gaussian blur of (B, 3, S, S) by (B,) sigmas in pixels, reflected at borders."""
    S = pixels.shape[-1]
    reach = min(BLUR_REACH, S - 1)
    steps = torch.arange(-reach, reach + 1, device=pixels.device)     # (T,)
    taps = torch.softmax(-0.5 * (steps / sigma.clamp(min=0.05)[:, None])**2, 1)    # (B, T)
    # a matrix per sample: its column j is the blur of a line that is 1 at pixel j alone
    lines = F.pad(torch.eye(S, device=pixels.device)[None], (reach, reach), mode="reflect")[0]
    windows = lines.unfold(1, len(steps), 1)                          # (S, S, T): j, i, tap
    matrix = torch.einsum("jit,bt->bij", windows, taps)[:, None]      # (B, 1, S, S)
    return matrix @ pixels @ matrix.mT                                # down, then across
