"""data/images.py: every kind of file becomes upright RGB or a counted reason; each operation of the
augmentation equals its definition, written out or Pillow's."""
import colorsys
import dataclasses
import io
import itertools
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from data import images
from data.images import (Augmentation, BadImage, augment_batch, crop_box, decode, draw_augmentation,
                         eval_image, normalise, squash_image, train_image)

# Pillow tells of odd files; data.images hushes it, and pytest sets that back
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

MEAN = torch.tensor(images.MEAN).view(3, 1, 1)
STD = torch.tensor(images.STD).view(3, 1, 1)


def scene(width=80, height=60, seed=0):
    """Shapes over a gradient: edges, smooth areas, every hue."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = Image.fromarray(np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width],
                                       2).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        left, top, size = rng.integers(width), rng.integers(height), rng.integers(3, 20)
        colour = tuple(rng.integers(256, size=3).tolist())
        draw.ellipse((left, top, left + size, top + size), fill=colour)
    return picture


def encoded(picture, kind="JPEG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def batch(*pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


JPEG = encoded(scene(400, 300), quality=95)  # 40 kB: even a tenth of it is past the header


# ---------------------------------------------------------------- decoding: what is refused

def bomb(width, height):
    """A PNG that states a size and holds almost nothing."""
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize("data, reason", [
    (b"", "empty"),
    (np.random.default_rng(0).bytes(5000), "not an image"),
    (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # would start a program
    (JPEG[:20], "not an image"),
    (JPEG[:len(JPEG) // 10], "truncated"),
    (JPEG[:len(JPEG) // 2], "truncated"),
    (JPEG[:len(JPEG) * 99 // 100], "truncated"),
    (encoded(scene(), "PNG")[:900], "truncated"),
    (encoded(scene(), "WEBP")[:400], "not an image"),  # its decoder wants the whole file
    (bomb(30_000, 30_000), "too large"),
    (bomb(10_000, 10_000), "too large"),
    (bomb(20, 20), "truncated"),
    (encoded(Image.new("RGB", (1, 1)), "PNG"), "absurd shape"),
    (encoded(Image.new("RGB", (1, 4000)), "PNG"), "absurd shape"),
    (encoded(Image.new("F", (9, 9)), "TIFF"), "unknown pixel format"),
], ids=("empty random html eps header 10% 50% 99% png webp bomb large hollow 1x1 1x4000 float"
        .split()))
def test_a_bad_image_has_a_reason(data, reason):
    with pytest.raises(BadImage) as error:
        decode(data)
    assert str(error.value) == reason


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(BadImage, match="too large"):
        decode(bomb(30_000, 30_000))


def test_damage_at_random_places_raises_nothing_but_bad_image():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encoded(scene(30, 20), kind, **options) for kind, options in (
        ("JPEG", {"exif": exif}), ("PNG", {"exif": exif}), ("WEBP", {}), ("GIF", {}), ("BMP", {}))]
    good = 0
    for turn in range(1000):
        data = bytearray(seeds[turn % len(seeds)])
        for _ in range(rng.integers(1, 10)):
            data[rng.integers(min(len(data), 200))] = rng.integers(256)
        try:
            good += decode(bytes(data)).mode == "RGB"
        except BadImage:
            continue
    assert 50 < good < 950


# ---------------------------------------------------------------- decoding: what is made of it

def test_cmyk_becomes_rgb():
    decoded = np.array(decode(encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)))))
    assert np.abs(decoded.astype(int) - (255, 0, 0)).max() <= 2  # JPEG


def test_sixteen_bits_are_scaled_to_eight():
    values = np.array([[0, 257, 32768, 65535]], np.uint16).repeat(4, 0)
    decoded = np.array(decode(encoded(Image.fromarray(values), "PNG")))
    assert decoded[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode, colour, seen", [
    ("RGBA", (200, 100, 0, 0), (255, 255, 255)),
    ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
    ("RGBA", (200, 100, 0, 102), (233, 193, 153)),  # 0.4 colour + 0.6 white
    ("LA", (100, 0), (255, 255, 255)),
    ("LA", (100, 255), (100, 100, 100)),
])
def test_alpha_is_laid_on_white(mode, colour, seen):
    assert decode(encoded(Image.new(mode, (9, 9), colour), "PNG")).getpixel((4, 4)) == seen


def test_a_transparent_colour_of_a_palette_becomes_white():
    palette = scene().convert("P")
    clear = palette.getpixel((40, 30))
    seen = np.array(decode(encoded(palette, "PNG", transparency=clear)))
    holes = np.array(palette) == clear
    assert (seen[holes] == 255).all()
    assert (seen[~holes] == np.array(palette.convert("RGB"))[~holes]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_other_modes_are_converted_as_pillow_does(mode):
    picture = scene().convert(mode)
    assert decode(encoded(picture, "PNG")).tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(), exif=exif)
    assert decode(data).tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).tobytes()


def test_a_corrupt_exif_block_counts_as_upright():
    for block in (b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff"):
        damaged = encoded(scene(), exif=b"Exif\0\0" + block)
        assert decode(damaged).tobytes() == decode(encoded(scene())).tobytes()


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("WEBP", {"lossless": True})])
def test_an_animation_gives_its_first_frame(kind, options):
    first, second = Image.new("RGB", (20, 20), (255, 0, 0)), Image.new("RGB", (20, 20), (0, 0, 255))
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    assert decode(data).getcolors() == [(400, (255, 0, 0))]


# ---------------------------------------------------------------- evaluation

@pytest.mark.parametrize("width, height", [(80, 60), (60, 81), (32, 32), (32, 47), (20, 11),
                                           (301, 32)])
def test_eval_image_is_torchvision_s_in_pillow_form_bit_for_bit(width, height):
    picture, size = scene(width, height), 32
    if width <= height:
        w, h = size, int(size * height / width)
    else:
        w, h = int(size * width / height), size
    resized = picture if (w, h) == (width, height) else picture.resize((w, h), Image.BICUBIC)
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    expected = np.array(resized)[top:top + size, left:left + size].transpose(2, 0, 1)
    assert (eval_image(picture, size).numpy() == expected).all()
    assert eval_image(picture, size).is_contiguous()


def test_squash_image_keeps_the_whole_picture():
    expected = np.array(scene().resize((32, 32), Image.BICUBIC)).transpose(2, 0, 1)
    assert (squash_image(scene(), 32).numpy() == expected).all()


def test_normalise_is_clip_s():
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    expected = (pixels.double() / 255 - MEAN) / STD
    assert normalise(pixels).dtype == torch.float32
    torch.testing.assert_close(normalise(pixels).double(), expected, atol=1e-6, rtol=0)  # float32


# ---------------------------------------------------------------- training: crop and resize

WHOLE = Augmentation(crop=(1.0, 1.0), ratio=(4 / 3, 4 / 3))  # of a 4:3 picture


def test_a_training_image_is_pillow_s_resize_within_two_grey_levels():
    made = train_image(encoded(scene(400, 300), "PNG"), 64, WHOLE, np.random.default_rng(0))
    expected = np.array(scene(400, 300).resize((64, 64), Image.BICUBIC)).transpose(2, 0, 1)
    off = np.abs(made.numpy().astype(int) - expected)
    assert off.max() <= 2 and off.mean() < 0.05  # roundings of intermediate values differ


def test_a_training_crop_is_the_box_resized():
    rng = np.random.default_rng(5)
    augmentation = Augmentation(crop=(0.2, 1.0))
    made = train_image(encoded(scene(90, 70), "PNG"), 32, augmentation, np.random.default_rng(5))
    box = crop_box(90, 70, augmentation.crop, augmentation.ratio, rng)
    expected = np.array(scene(90, 70).crop(box).resize((32, 32), Image.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(made.numpy().astype(int) - expected).max() <= 2


def test_a_rotated_picture_is_cropped_as_the_upright_one():
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(scene(90, 70), "PNG", exif=exif)
    upright = encoded(scene(90, 70).transpose(Image.Transpose.ROTATE_270), "PNG")
    made = [train_image(data, 32, Augmentation(crop=(0.2, 1.0)), np.random.default_rng(1))
            for data in (lying, upright)]
    assert torch.equal(*made)


def noise(width, height):
    """1/f noise: the spectrum of natural pictures, but with detail everywhere."""
    white = np.fft.rfft2(np.random.default_rng(0).normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    grey = np.fft.irfft2(white / frequency, (height, width))
    pixels = (128 + 50 * (grey - grey.mean()) / grey.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGB")


@pytest.mark.parametrize("picture, bound", [(noise(1200, 900), 1.0), (scene(1200, 900), 0.3)])
def test_a_jpeg_decoded_small_differs_by_less_than_a_grey_level(picture, bound):
    data = encoded(picture, quality=90)
    small = train_image(data, 224, WHOLE, np.random.default_rng(0)).int()  # at 1/2
    full = train_image(encoded(decode(data), "PNG"), 224, WHOLE, np.random.default_rng(0)).int()
    assert 0 < (small - full).abs().float().mean() < bound  # grey levels


def test_a_jpeg_is_decoded_small_only_if_twice_the_detail_remains():
    for size, expected in ((100, 2), (101, 1), (50, 4), (25, 8)):
        image = images.open_image(encoded(scene(533, 400)))
        shrunk = images._skip_detail(image, 400 / size)
        assert shrunk == expected
        assert image.height == 400 // shrunk


def reference_boxes(width, height, count):
    """RandomResizedCrop by its definition, for pictures that need no fallback."""
    rng = np.random.default_rng(123)
    while count:
        area = width * height * rng.uniform(0.2, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = int(round(np.sqrt(area * aspect))), int(round(np.sqrt(area / aspect)))
        if w <= width and h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            yield left, top, left + w, top + h
            count -= 1


@pytest.mark.parametrize("width, height", [(256, 256), (400, 256)])
def test_crops_have_the_distribution_of_random_resized_crop(width, height):
    rng, n = np.random.default_rng(0), 10_000
    ours = np.array([crop_box(width, height, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(n)])
    theirs = np.array(list(reference_boxes(width, height, n)))
    for boxes in (ours, theirs):
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
    for column in range(4):
        a, b = np.sort(ours[:, column]), np.sort(theirs[:, column])
        at = np.union1d(a, b)
        apart = np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")
        assert np.abs(apart).max() / n < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, 0.1 %


@pytest.mark.parametrize("size, box", [((300, 20), (136, 0, 163, 20)),
                                       ((20, 300), (0, 136, 20, 163))])
def test_a_picture_too_long_for_any_crop_gives_its_centre(size, box):
    assert crop_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0)) == box


# ---------------------------------------------------------------- draws

PAPER = Augmentation(crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                     grey_p=0.2, blur_p=0.5)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return np.stack([draw_augmentation(PAPER, rng) for _ in range(10_000)])


def test_operations_are_as_frequent_as_stated(drawn):
    jittered = (drawn[:, images.BRIGHTNESS:images.ORDER] != (1, 1, 1, 0)).any(1)
    for hits, p in ((drawn[:, images.FLIP], 0.5), (drawn[:, images.GREY], 0.2), (jittered, 0.8),
                    (drawn[:, images.SIGMA] > 0, 0.5)):
        assert abs(hits.mean() - p) < 4 * math.sqrt(p * (1 - p) / len(drawn))  # 4 standard errors


@pytest.mark.parametrize("column, low, high", [
    (images.BRIGHTNESS, 0.6, 1.4), (images.CONTRAST, 0.6, 1.4), (images.SATURATION, 0.6, 1.4),
    (images.HUE, -0.1, 0.1), (images.SIGMA, 0.1, 2.0)])
def test_parameters_are_uniform_in_their_range(drawn, column, low, high):
    values = drawn[:, column]
    values = np.sort(values[values != (0 if column in (images.SIGMA, images.HUE) else 1)])
    assert values[0] >= low - 1e-6 and values[-1] <= high + 1e-6
    apart = (values - low) / (high - low) - np.arange(len(values)) / len(values)
    assert np.abs(apart).max() < 1.95 / math.sqrt(len(values))  # Kolmogorov-Smirnov, 0.1 %


def test_no_factor_of_the_jitter_is_below_zero():
    rng, wide = np.random.default_rng(0), Augmentation(jitter=(1.5, 1.5, 1.5, 0), jitter_p=1.0)
    factors = np.stack([draw_augmentation(wide, rng)[images.BRIGHTNESS:images.HUE]
                        for _ in range(200)])
    assert 0 <= factors.min() < 0.1 and factors.max() > 2


def test_orders_of_the_jitter_are_equally_frequent(drawn):
    found, counts = np.unique(drawn[:, images.ORDER:], axis=0, return_counts=True)
    assert [tuple(order) for order in found] == list(itertools.permutations(range(4)))
    expected = len(drawn) / 24
    assert ((counts - expected)**2 / expected).sum() < 49.7  # chi squared, 23 degrees, 0.1 %


def test_changing_one_probability_leaves_the_other_draws():
    always = Augmentation(blur_p=1.0, jitter=(0.4,) * 4, jitter_p=1.0)
    plain, flipped = (draw_augmentation(dataclasses.replace(always, flip=p),
                                        np.random.default_rng(3)) for p in (0.0, 1.0))
    assert (plain != flipped).tolist() == [True] + [False] * 10


def test_a_seed_always_gives_the_same_draws_and_crops():
    rng = np.random.default_rng(0)
    drawn = np.stack([draw_augmentation(PAPER, rng) for _ in range(3)])
    expected = [[0, 0, 0.131402507, 1, 1, 1, 0, 2, 1, 3, 0],
                [1, 0, 1.740039945, 0.839769542, 0.938149750, 0.622655749, -0.075143345,
                 3, 2, 1, 0],
                [0, 0, 0, 0.911137164, 0.708077192, 1.177190661, 0.00507086469, 0, 1, 2, 3]]
    assert np.array_equal(drawn, np.array(expected, np.float32))
    rng = np.random.default_rng(0)
    boxes = [crop_box(400, 300, (0.2, 1.0), (3 / 4, 4 / 3), rng) for _ in range(3)]
    assert boxes == [(24, 12, 384, 296), (71, 0, 384, 244), (170, 77, 317, 259)]


# ---------------------------------------------------------------- the device part

def neutral(count):
    draws = torch.zeros(count, images.DRAWS)
    draws[:, images.BRIGHTNESS:images.HUE] = 1
    draws[:, images.ORDER:] = torch.arange(4)
    return draws


def augmented(pictures, column=None, value=None):
    """The device part with one parameter set, back in grey levels (B, 3, S, S)."""
    draws = neutral(len(pictures))
    if column is not None:
        draws[:, column] = value
    return (augment_batch(pictures, draws, PAPER) * STD + MEAN) * 255


SQUARE = [scene(64, 64, seed) for seed in range(3)]


def test_neutral_draws_change_nothing():
    made = augment_batch(batch(*SQUARE), neutral(3), PAPER)
    torch.testing.assert_close(made, normalise(batch(*SQUARE)), atol=5e-6, rtol=0)  # hue and back


def test_flip_is_horizontal():
    expected = batch(*map(ImageOps.mirror, SQUARE)).float()
    made = augmented(batch(*SQUARE), images.FLIP, 1.0)
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=0)  # float32 of 0..255


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
@pytest.mark.parametrize("column, enhance", [
    (images.BRIGHTNESS, ImageEnhance.Brightness), (images.CONTRAST, ImageEnhance.Contrast),
    (images.SATURATION, ImageEnhance.Color)])
def test_jitter_equals_pillow_within_a_grey_level(column, enhance, factor):
    expected = batch(*(enhance(picture).enhance(factor) for picture in SQUARE)).float()
    off = (augmented(batch(*SQUARE), column, factor) - expected).abs()
    assert off.max() < 1.5 and off.mean() < 0.8  # Pillow rounds the mean grey, and cuts the result


@pytest.mark.parametrize("turns", [-0.1, 0.03, 0.1])
def test_hue_equals_colorsys(turns):
    pixels = np.array(SQUARE[0])[::4, ::4] / 255
    expected = np.empty_like(pixels)
    for at in np.ndindex(16, 16):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[at])
        expected[at] = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    made = augmented(batch(SQUARE[0]), images.HUE, turns)[0, :, ::4, ::4].permute(1, 2, 0)
    assert np.abs(made.numpy() - 255 * expected).max() < 1e-2  # float32


def test_grey_equals_pillow_s():
    expected = batch(*(picture.convert("L").convert("RGB") for picture in SQUARE)).float()
    made = augmented(batch(*SQUARE), images.GREY, 1.0)
    assert (made - expected).abs().max() < 0.6  # Pillow rounds


@pytest.mark.parametrize("side, sigma", [(64, 0.1), (64, 0.7), (64, 2.0), (8, 2.0)])
def test_blur_is_a_gaussian_with_reflected_borders(side, sigma):
    picture, reach = scene(side, side), min(11, side - 1)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma)**2)
    taps /= taps.sum()
    padded = np.pad(np.array(picture, float), ((reach, reach), (reach, reach), (0, 0)), "reflect")
    down = sum(tap * padded[k:k + side] for k, tap in enumerate(taps))
    across = sum(tap * down[:, k:k + side] for k, tap in enumerate(taps))
    made = augmented(batch(picture), images.SIGMA, sigma)[0].permute(1, 2, 0)
    assert np.abs(made.numpy() - across).max() < 1e-2  # float32


def test_a_picture_that_is_not_blurred_keeps_its_pixels_exactly():
    pixels = batch(*SQUARE).float() / 255
    made = images._blur(pixels, torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(made[::2], pixels[::2]) and not torch.equal(made[1], pixels[1])


def grey_of(pixels):
    return 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]


def hue_by_colorsys(pixels, turns):
    moved = np.empty_like(pixels)
    for y, x in np.ndindex(*pixels.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixels[:, y, x])
        moved[:, y, x] = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    return moved


def jitter_by_definition(pixels, factors, order):
    """torchvision's ColorJitter of one picture (3, S, S) in float64, one operation at a time."""
    for operation in order:
        factor = factors[operation]
        if operation == 0:
            pixels = factor * pixels
        elif operation == 1:
            pixels = factor * pixels + (1 - factor) * grey_of(pixels).mean()
        elif operation == 2:
            pixels = factor * pixels + (1 - factor) * grey_of(pixels)
        else:
            pixels = hue_by_colorsys(pixels, factor)
        pixels = pixels.clip(0, 1)
    return pixels


def test_each_sample_has_its_own_order_of_the_four():
    orders = list(itertools.permutations(range(4)))
    factors = np.random.default_rng(0).uniform((0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1), (24, 4))
    draws = neutral(24)
    draws[:, images.BRIGHTNESS:images.ORDER] = torch.from_numpy(factors)
    draws[:, images.ORDER:] = torch.tensor(orders)
    pictures = batch(*(scene(16, 16, seed) for seed in range(24)))
    made = augment_batch(pictures, draws, PAPER) * STD + MEAN
    for picture, own, order, found in zip(pictures, factors, orders, made):
        expected = jitter_by_definition(picture.double().numpy() / 255, own, order)
        assert np.abs(found.numpy() - expected).max() < 1e-5  # float32


def test_a_sample_is_augmented_alike_in_any_batch(drawn):
    pictures, draws = batch(*SQUARE, *SQUARE), torch.from_numpy(drawn[:6])
    whole = augment_batch(pictures, draws, PAPER)
    for i in range(6):
        alone = augment_batch(pictures[i:i + 1], draws[i:i + 1], PAPER)[0]
        torch.testing.assert_close(alone, whole[i], atol=1e-5, rtol=0)  # a mean in another order


@pytest.mark.parametrize("used", [Augmentation(), Augmentation(flip=0.5),
                                  Augmentation(grey_p=0.5),
                                  Augmentation(jitter=(0.4, 0, 0, 0), jitter_p=0.5),
                                  Augmentation(jitter=(0, 0, 0, 0.1), jitter_p=0.5),
                                  Augmentation(blur_p=0.5)])
def test_leaving_out_what_is_never_used_changes_nothing(used):
    rng = np.random.default_rng(0)
    draws = torch.from_numpy(np.stack([draw_augmentation(used, rng) for _ in range(12)]))
    pictures = batch(*SQUARE * 4)
    torch.testing.assert_close(augment_batch(pictures, draws, used),
                               augment_batch(pictures, draws, PAPER), atol=5e-6, rtol=0)


def test_the_device_part_compiles_as_one_graph_with_equal_results(drawn):
    pictures, draws = batch(*SQUARE), torch.from_numpy(drawn[:3])
    # tracing only: generating the kernels takes 50 s, and tests/bench/loader.py does it
    compiled = torch.compile(augment_batch, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pictures, draws, PAPER),
                               augment_batch(pictures, draws, PAPER), atol=1e-5, rtol=0)
