"""The toy world: everything the paper's experiment needs, drawn from a seed in seconds.

    python -m data.prepare.toy     # -> data/toy/{pairs,nights,benchmarks,vocabulary}

Pictures of one to three objects on a backdrop, 64 pixels a side, in the formats of real data:

    pairs/00000.tar ...         images with a caption each; a tenth of these is of other images
    pairs/held_out/*.tar        unseen scenes, rightly described by one to five captions
    nights/data.csv             triplets and votes of simulated observers, in NIGHTS' columns
    benchmarks/wds_toy_*_test/  zero-shot sets in the layout that evaluate.py reads
    vocabulary/toy.tiktoken     256 bytes, 256 bytes that end a word, and this world's words
"""
import csv
import io
import json
import operator
import os
import pathlib
import random
import shutil
from base64 import b64encode
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain

import numpy as np
from PIL import Image

from configs import check_ranges, load_config
from data.log import run_main
from data.prepare import tars


@dataclass
class Config:
    seed: int = 0
    out: str = "data/toy"
    pairs: int = 24_000      # training pairs
    held_out: int = 1_000    # pairs of unseen scenes
    triplets: int = 12_000   # three quarters of them get six votes or more
    per_set: int = 600       # images of a benchmark set, rounded to equal classes
    captions: int = 1        # different captions of each training pair
    wrong: float = 0.1       # share of training pairs whose captions belong to another scene
    processes: int = 0       # 0: as many as cores

    def check(self):
        check_ranges(self, positive=("triplets", "per_set", "captions"),
                     not_negative=("seed", "pairs", "held_out", "processes"))
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"wrong={self.wrong}: is a share, from 0 to 1")


# --------------------------------------------------------------------- the world, as plain data

SYNONYMS = {  # what captions call each value; the first word is its name
    "shape": "circle disc ball, square box, triangle wedge, star, heart, cross plus, "
             "ring hoop, crescent moon, diamond rhombus, arrow pointer, bar rectangle, "
             "flower blossom",
    "color": "red crimson scarlet, orange tangerine, yellow golden lemon, green emerald, "
             "blue azure, purple violet, pink rosy, brown chestnut, black jet, white snowy, "
             "grey gray silver",
    "size": "small little tiny, medium middling, large big huge",
    "texture": "plain solid, striped stripy, dotted spotted, chequered checkered"}
WORDS = {kind: [entry.split() for entry in text.split(", ")] for kind, text in SYNONYMS.items()}
SHAPES, COLORS, SIZES, TEXTURES = ([words[0] for words in table] for table in WORDS.values())
TONES = (("light", "bright"), (), ("dark", "dim"))  # of backdrops; the middling one is unsaid
TONE_SHARES = (0.7, 0.15, 0.15)  # paper is light: most objects are darker than what they are on
RELATIONS = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
             "above": ("above", "over"), "below": ("below", "under", "beneath"),
             "near": ("next to", "beside", "near")}
PLACES = ("top left", "top", "top right", "left", "middle", "right",
          "bottom left", "bottom", "bottom right")
COUNTS = ["one", "two", "three"]
THINGS = ("shape", "object", "thing")  # an object whose shape is left unsaid
FRAMES = ("{}", "{}", "{}", "a picture of {}", "an image of {}", "a photo of {}",
          "a drawing of {}", "this shows {}", "we see {}", "look at {}", "i drew {}",
          "{} and nothing else")

# A colour term is a region of CIELAB: lowest and highest lightness, chroma and hue angle. The
# closest two (blue, purple) are 14 units apart; none covers a backdrop's faint tints.
REGIONS = np.array([
    [(40, 60, 22), (52, 85, 38)], [(64, 68, 56), (74, 90, 70)],          # red, orange
    [(84, 62, 90), (94, 90, 102)], [(42, 42, 130), (62, 70, 152)],       # yellow, green
    [(30, 52, 276), (48, 85, 296)], [(30, 50, 310), (44, 75, 325)],      # blue, purple
    [(70, 35, 345), (80, 55, 365)], [(28, 26, 50), (40, 42, 68)],        # pink, brown
    [(3, 0, 0), (12, 4, 360)], [(95, 0, 0), (99, 3, 360)],               # black, white
    [(46, 0, 0), (60, 4, 360)],                                          # grey, and TONES
    [(70, 6, 0), (90, 18, 360)], [(42, 6, 0), (66, 18, 360)], [(16, 6, 0), (38, 18, 360)]])
CONTRAST = 30  # CIELAB units wanted between every object and the backdrop
SIDE = 64      # pixels of an image side
RADII = np.array([16.0, 21.0, 26.0])  # pixels: circles around small, medium, large objects
CROWDED = 0.56  # where there are several, all are smaller: three large ones just fit

# Shapes as signed distances to their outline, negative inside, in a circle of radius 1; y goes
# up. The minimum joins two areas, the maximum intersects them.


def disc(x, y, radius):
    return np.sqrt(x * x + y * y) - radius  # np.hypot takes 16 times as long


def box(x, y, width, height):
    return np.maximum(np.abs(x) - width, np.abs(y) - height)


def roof(x, y, nx, ny, height):
    """Below the straight line of normal (nx, ny), and below its mirror image."""
    return nx * np.abs(x) + ny * (y - height)


def fold(x, y, n, lift=0.0):
    """Turn every point into the upper one of n sectors, seen from `lift` up its middle."""
    sector = 2 * np.pi / n
    angle = (np.arctan2(x, y) + sector / 2) % sector - sector / 2
    r = disc(x, y, 0)
    return r * np.sin(angle), r * np.cos(angle) - lift


OUTLINES = {
    "circle": lambda x, y: disc(x, y, 0.9),
    "square": lambda x, y: box(x, y, 0.78, 0.78),
    "triangle": lambda x, y: np.maximum(roof(x, y, 0.87, 0.5, 0.87), -0.6 - y),
    "star": lambda x, y: roof(*fold(x, y, 5), 0.936, 0.352, 1),
    "heart": lambda x, y: disc(x, 1.15 * y + 0.25 - 0.72 * np.sqrt(np.abs(x)), 0.83),
    "cross": lambda x, y: box(*fold(x, y, 4), 0.3, 0.95),
    "ring": lambda x, y: np.abs(disc(x, y, 0.7)) - 0.24,
    "crescent": lambda x, y: np.maximum(disc(x, y, 0.95), -disc(x - 0.45, y, 0.78)),
    "diamond": lambda x, y: roof(x, np.abs(y), 0.8, 0.6, 0.92),
    "arrow": lambda x, y: np.minimum(np.maximum(roof(x, y, 0.8, 0.6, 0.95), -y),
                                     box(x, y + 0.4, 0.24, 0.55)),
    "bar": lambda x, y: box(x, y, 0.97, 0.36),
    "flower": lambda x, y: np.minimum(disc(*fold(x, y, 5, 0.56), 0.4), disc(x, y, 0.5)),
}
# Textures let the backdrop through, so that a colour stays what it is. Waves s and t, across
# and along the object, in -1..1 -> how open it is there, cut to 0..1.
WEAVES = {"plain": lambda s, t: 0 * s, "striped": lambda s, t: 2 * t,
          "dotted": lambda s, t: 2.5 * (s + t) - 2, "chequered": lambda s, t: 4 * s * t}


# --------------------------------------------------------------------------------- scenes

@dataclass
class Scenes:
    """n scenes as arrays with room for three objects; those beyond `count` are not drawn."""
    count: np.ndarray    # (n,) 1, 2 or 3
    shape: np.ndarray    # (n,3) indices into SHAPES, and so on for the next three
    color: np.ndarray    # (n,3)
    size: np.ndarray     # (n,3)
    texture: np.ndarray  # (n,3)
    lab: np.ndarray      # (n,3,3) CIELAB of each object
    radius: np.ndarray   # (n,3) pixels
    angle: np.ndarray    # (n,3) radians
    xy: np.ndarray       # (n,3,2) centres in pixels, right and down
    tone: np.ndarray     # (n,) index into TONES
    ground: np.ndarray   # (n,2,3) CIELAB of the backdrop's two ends
    sweep: np.ndarray    # (n,2) how fast one end turns into the other, along x and y

    def __len__(self):
        return len(self.count)

    def __getitem__(self, rows):
        return Scenes(**{name: array[rows] for name, array in vars(self).items()})


def draw_scenes(rng, n, many=0.35, **fixed):
    """n random scenes, a share `many` of them with two or three objects.

    fixed: (n,) values for "count", "tone", and the first object's "shape", "color", "size",
    "texture" and "place" (index into PLACES; for small objects only).
    """
    count = fixed.get("count", 1 + (rng.random(n) < many) * rng.integers(1, 3, n))
    drawn = {name: rng.integers(0, len(table), (n, 3)) for name, table in WORDS.items()}
    drawn["texture"] *= rng.random((n, 3)) < 0.4  # so that 70 % are plain
    for name in drawn:
        if name in fixed:
            drawn[name][:, 0] = fixed[name]
    lab = draw_colors(rng, drawn["color"].ravel()).reshape(n, 3, 3)
    radius = RADII[drawn["size"]] * rng.uniform(0.92, 1.08, (n, 3))
    radius *= np.where(count > 1, CROWDED, 1)[:, None]
    tone, ground = draw_grounds(rng, lab, count, fixed.get("tone"))
    angle = rng.uniform(-0.12, 0.12, (n, 3))
    xy = draw_places(rng, count, radius, fixed.get("place"))
    sweep = rng.normal(0, 0.4, (n, 2)) * rng.integers(0, 2, (n, 1))
    return Scenes(count=count, **drawn, lab=lab, radius=radius, angle=angle, xy=xy, tone=tone,
                  ground=ground, sweep=sweep)


def lab_to_rgb(lab):
    """CIELAB under D65 (..., 3) -> sRGB (..., 3), 0..255 if a screen has it (IEC 61966)."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9505, 1.0, 1.0888)
    linear = xyz @ np.array([[3.2406, -0.9689, 0.0557], [-1.5372, 1.8758, -0.2040],
                             [-0.4986, 0.0415, 1.0570]])
    curve = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return 255 * np.where(linear > 0.0031308, curve, 12.92 * linear)


def draw_colors(rng, regions):
    """Rows of REGIONS (n,) -> (n,3) CIELAB, drawn again until a screen can show them."""
    lab, todo = np.empty((len(regions), 3)), np.arange(len(regions))  # most pass at once
    while len(todo):
        low, high = REGIONS[regions[todo]].swapaxes(0, 1)                         # (k,3) each
        light, chroma, hue = (low + (high - low) * rng.random(low.shape)).T
        hue = np.radians(hue)
        lab[todo] = np.stack([light, chroma * np.cos(hue), chroma * np.sin(hue)], -1)
        rgb = lab_to_rgb(lab[todo])
        todo = todo[((rgb < 0) | (rgb > 255)).any(-1)]
    return lab


def draw_places(rng, count, radius, place=None):
    """Centres (n,3,2) in pixels: often near the middle, or each in a quadrant of its own."""
    free = rng.uniform(-1, 1, (*radius.shape, 2))
    quadrant = rng.permuted(np.tile(np.arange(4), (len(count), 1)), axis=1)[:, :3]  # (n,3)
    quadrant = SIDE // 4 + SIDE // 2 * np.stack([quadrant % 2, quadrant // 2], -1)  # (n,3,2)
    # a quarter holds its object whole; alone, half of all lie within a quarter of the way out
    several = quadrant + free * np.maximum(SIDE / 4 - 0.5 - radius, 0)[..., None]
    alone = SIDE / 2 + free * np.abs(free) * (SIDE / 2 - 1 - radius)[..., None]   # (n,3,2)
    if place is not None:
        alone = SIDE / 2 + 14 * (np.stack([place % 3, place // 3], -1)[:, None] - 1) + 2 * free
    return np.where((count == 1)[:, None, None], alone, several)


def draw_grounds(rng, lab, count, tone=None, tries=12):
    """Tones (n,) and ends (n,2,3) of backdrops: of a few tries the first that has CONTRAST."""
    n = len(lab)
    if tone is None:
        tones = rng.choice(len(TONES), (n, tries), p=TONE_SHARES)                 # (n,tries)
    else:
        tones = np.repeat(tone[:, None], tries, axis=1)
    tints = draw_colors(rng, len(COLORS) + tones.ravel()).reshape(n, tries, 1, 3)
    apart = np.linalg.norm(tints - lab[:, None], axis=-1)                         # (n,tries,3)
    drawn = np.arange(3) < count[:, None, None]                                   # (n,1,3)
    best = np.where(drawn, apart, CONTRAST).min(-1).clip(max=CONTRAST).argmax(1)  # (n,)
    ends = tints[np.arange(n), best] + rng.uniform(-7, 7, (n, 2, 1)) * (1, 0, 0)  # (n,2,3)
    return tones[np.arange(n), best], ends


# --------------------------------------------------------------------------------- pictures

def render(scenes, rng, style=""):
    """Scenes -> (n,64,64,3) uint8; style: "", "outline", "noise" or "inverted"."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for first in range(0, len(scenes), 16):  # stays in the cache: 3 times faster than 1,000
        some = scenes[first:first + 16]
        canvas = draw_backdrops(some, rng)                                        # (k,3,S,S)
        for slot in range(3):
            rows = np.flatnonzero(some.count > slot)
            ink = lab_to_rgb(some.lab[rows, slot]).astype(np.float32)[..., None, None]
            canvas[rows] += cover(some[rows], slot, style)[:, None] * (ink - canvas[rows])
        if style == "noise":
            canvas += rng.normal(0, 45, canvas.shape)
        canvas = canvas.clip(0, 255).round()
        if style == "inverted":
            canvas = 255 - canvas
        images[first:first + 16] = canvas.transpose(0, 2, 3, 1)
    return images


def draw_backdrops(scenes, rng):
    """(n,3,64,64) float32: a sweep from one end of the ground to the other, and grain."""
    ends = lab_to_rgb(scenes.ground).astype(np.float32)[..., None, None]          # (n,2,3,1,1)
    line = np.linspace(-1, 1, SIDE, dtype=np.float32)
    across, down = scenes.sweep.astype(np.float32).T[..., None, None]             # (n,1,1) each
    mix = (0.5 + across * line + down * line[:, None]).clip(0, 1)[:, None]        # (n,1,S,S)
    grain = rng.standard_normal((len(scenes), 1, SIDE, SIDE), dtype=np.float32)
    grain *= rng.uniform(0, 5, (len(scenes), 1, 1, 1)).astype(np.float32)
    return ends[:, 0] + mix * (ends[:, 1] - ends[:, 0]) + grain


def cover(scenes, slot, style):
    """How much of each pixel the objects in `slot` cover: (n,64,64) float32 in 0..1."""
    radius = scenes.radius[:, slot, None, None].astype(np.float32)                # (n,1,1)
    angle = scenes.angle[:, slot, None, None].astype(np.float32)
    centre = scenes.xy[:, slot, :, None, None].astype(np.float32)                 # (n,2,1,1)
    pixel = np.arange(SIDE, dtype=np.float32) + 0.5
    right = (pixel - centre[:, 0]) / radius
    up = (centre[:, 1] - pixel[:, None]) / radius
    x = right * np.cos(angle) - up * np.sin(angle)                                # (n,S,S)
    y = right * np.sin(angle) + up * np.cos(angle)
    distance = np.empty_like(x)
    for index, outline in enumerate(OUTLINES.values()):
        own = scenes.shape[:, slot] == index
        distance[own] = outline(x[own], y[own])
    distance *= radius                                                            # in pixels
    if style == "outline":
        distance = np.abs(distance) - 1.3
    wave = 2 * np.pi / np.maximum(0.5, 6 / radius)  # two a radius, six pixels or more each
    hole = np.zeros_like(x)
    for index, weave in enumerate(WEAVES.values()):
        own = scenes.texture[:, slot] == index
        hole[own] = weave(np.sin(wave[own] * x[own]), np.sin(wave[own] * y[own])).clip(0, 1)
    hole[distance > -1.5] = 0                    # a rim stays whole, and with it the shape
    return (0.5 - distance).clip(0, 1) * (1 - 0.8 * hole)  # the edge is one pixel wide


# --------------------------------------------------------------------------------- captions

def name_object(scenes, i, slot, rng):
    """An object in words, said as fully as people do: "small red circle", "striped thing"."""
    shares = {"size": 0.2, "texture": 0.2, "color": 0.75, "shape": 0.9}
    said = [name for name, share in shares.items() if rng.random() < share] or ["color"]
    words = []
    for name in said:
        synonyms = WORDS[name][getattr(scenes, name)[i, slot]]
        words.append(rng.choice(synonyms[:1] + synonyms))  # the usual one twice as often
    if "shape" not in said:
        words.append(rng.choice(THINGS))
    return " ".join(words)


def with_article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def relation_of(a, b, rng):
    """How an object at point a stands to one at point b, in words that are true."""
    right, down = b - a
    true = ["near"]
    if abs(right) > SIDE / 4:
        true.append("left" if right > 0 else "right")
    if abs(down) > SIDE / 4:
        true.append("above" if down > 0 else "below")
    return rng.choice(RELATIONS[rng.choice(true)])


def describe(scenes, i, rng):
    """One caption of scene i. rng: random.Random, for single draws 10 times NumPy's speed."""
    count = int(scenes.count[i])  # the order in which objects are named is random, too
    slots = rng.sample(range(count), count)
    nouns = [name_object(scenes, i, slot, rng) for slot in slots]
    phrases = [with_article(noun) for noun in nouns]
    if count == 1:
        text = phrases[0] if rng.random() < 0.9 else f"one {nouns[0]}"
        if rng.random() < 0.25:
            right, down = (scenes.xy[i, 0] * 3 // SIDE).astype(int).clip(0, 2)
            place = PLACES[3 * down + right]
            text += " in the middle" if place == "middle" else f" at the {place}"
    elif rng.random() < 0.45:
        a, b = scenes.xy[i, slots[:2]]
        text = f"{phrases[0]} {relation_of(a, b, rng)} {phrases[1]}"
    else:
        text = ", ".join(phrases[:-1]) + f" and {phrases[-1]}"
        if rng.random() < 0.5:
            text = f"{COUNTS[count - 1]} {rng.choice(THINGS)}s" + rng.choice(("", f": {text}"))
    tones = TONES[scenes.tone[i]]
    if tones and rng.random() < 0.2:
        text += f" on a {rng.choice(tones)} background"
    return rng.choice(FRAMES).format(text)


def caption(scenes, rng, fewest=1, most=1, wrong=0.0):
    """A list of different captions for each scene; a share `wrong` of them is another's."""
    n = len(scenes)
    words = random.Random(int(rng.integers(2 ** 62)))
    texts = []
    for i, many in enumerate(rng.integers(fewest, most + 1, n)):
        found = []
        while len(found) < many:
            text = describe(scenes, i, words)
            if text not in found:
                found.append(text)
        texts.append(found)
    moved = rng.integers(1, max(n, 2), n) * (rng.random(n) < wrong)  # to anyone but oneself
    return [texts[j] for j in (np.arange(n) + moved) % n]


# --------------------------------------------------------------------------------- observers
# They weigh differences in FACTORS, each in units of its mean over random pairs of objects.
# Nobody minds the backdrop; the three images of a triplet have another: pixels tell nothing.

FACTORS = {"color": ("color", "lab"), "shape": ("shape",), "size": ("size", "radius"),
           "place": ("xy",), "texture": ("texture",)}  # and the fields of Scenes that make them
UNITS = np.array([70.0, 0.48, 0.234, 0.129, 0.477])  # as `differences` measures them
WEIGHTS = np.array([1.0, 1.0, 0.4, 0.4, 0.3])     # of the average observer
PANEL, ASKED = 40, 10  # observers, and how many of them see a triplet: ten, as for NIGHTS
# (12,12): 1 - intersection over union of two shapes laid on each other
_X, _Y = np.meshgrid(np.linspace(-1, 1, 128), np.linspace(-1, 1, 128))
_MASKS = np.array([OUTLINES[name](_X, _Y).ravel() < 0 for name in SHAPES], int)  # (12,16384)
_BOTH, _AREA = _MASKS @ _MASKS.T, _MASKS.sum(1)
SHAPE_DIFFERENCES = 1 - _BOTH / (_AREA + _AREA[:, None] - _BOTH)


def differences(a, b):
    """Single-object scenes a, b -> (n,5): their differences in FACTORS, in UNITS."""
    color = np.linalg.norm(a.lab[:, 0] - b.lab[:, 0], axis=-1)
    shape = SHAPE_DIFFERENCES[a.shape[:, 0], b.shape[:, 0]]
    size = np.abs(np.log(a.radius[:, 0] / b.radius[:, 0]))
    place = np.linalg.norm(a.xy[:, 0] - b.xy[:, 0], axis=-1) / SIDE
    texture = a.texture[:, 0] != b.texture[:, 0]
    return np.stack([color, shape, size, place, texture], -1) / UNITS


def vary(rng, ref, changed):
    """Scenes that differ from `ref` in the FACTORS `changed` (n,5) bool and in backdrops."""
    new = draw_scenes(rng, len(ref), many=0)
    for column, fields in enumerate(FACTORS.values()):
        kept = ~changed[:, column]
        for name in fields:
            getattr(new, name)[kept] = getattr(ref, name)[kept]
    edge = new.radius[..., None] + 1
    new.xy = new.xy.clip(edge, SIDE - edge)  # what grew must still fit
    new.tone, new.ground = draw_grounds(rng, new.lab, new.count)
    return new


def judge(rng, panel, ref, left, right):
    """Is right nearer, (n,) bool, and how many observers in a row said so, (n,) in 1..10.

    panel: (PANEL,5) weights. As for NIGHTS, votes are counted until one differs from the first.
    """
    nearer = differences(ref, left) - differences(ref, right)                     # (n,5)
    asked = rng.random((len(ref), PANEL)).argsort(1)[:, :ASKED]                   # (n,10)
    felt = (panel[asked] * nearer[:, None]).sum(-1) + rng.normal(0, 0.1, asked.shape)  # (n,10)
    agree = (felt > 0) == (felt[:, :1] > 0)
    return felt[:, 0] > 0, np.where(agree.all(1), ASKED, agree.argmin(1))


def draw_triplets(seed, block, n):
    """A block of triplets: Scenes ref, left, right; right is nearer (n,) bool; votes (n,)."""
    rng = generator(seed, "nights", block)
    panel = WEIGHTS * np.exp(generator(seed, "panel", 0).normal(0, 0.3, (PANEL, len(FACTORS))))
    ref = draw_scenes(rng, n, many=0)
    chance = rng.random((n, len(FACTORS)))  # of ten changes 3 are left's, 3 right's, 1 both's
    left = vary(rng, ref, chance < 0.4)
    right = vary(rng, ref, (chance > 0.3) & (chance < 0.7))
    right_nearer, votes = judge(rng, panel, ref, left, right)
    return ref, left, right, right_nearer, votes


# --------------------------------------------------------------------------------- benchmarks
# set -> family, class names, prompts, labels (n,) -> what is held fixed in its scenes, style

_SHAPE = ["a {c}", "a picture of a {c}", "a drawing of a {c}"]
_THING = ["a {c} shape", "a {c} object", "a picture of a {c} thing"]
_ANGULAR = ["square", "diamond", "bar", "cross", "arrow"]
CLASSIFICATION = {
    "toy_color": ("plain", COLORS, _THING, lambda y: {"color": y}, ""),
    "toy_shape": ("plain", SHAPES, _SHAPE, lambda y: {"shape": y}, ""),
    "toy_shape_outline": ("ood", SHAPES, _SHAPE, lambda y: {
        "shape": y, "texture": 0, "color": COLORS.index("black"), "tone": 0 * y}, "outline"),
    "toy_shape_inverted": ("ood", SHAPES, _SHAPE, lambda y: {"shape": y}, "inverted"),
    "toy_color_noise": ("ood", COLORS, _THING, lambda y: {"color": y}, "noise"),
    "toy_count": ("structured", COUNTS, ["{c} shapes", "a picture of {c} objects"],
                  lambda y: {"count": y + 1}, ""),
    # the middle has an empty name, as a class of CLEVR-Distance has: labels must stay in place
    "toy_place": ("structured", [place.replace("middle", "") for place in PLACES],
                  ["a shape at the {c}"], lambda y: {"place": y, "size": 0}, ""),
    "toy_size": ("structured", SIZES, _THING, lambda y: {"size": y}, ""),
    "toy_texture": ("fine-grained", TEXTURES, _THING, lambda y: {"texture": y}, ""),
    "toy_color_shape": ("fine-grained", [f"{c} {s}" for c in COLORS for s in SHAPES], _SHAPE,
                        lambda y: {"color": y // len(SHAPES), "shape": y % len(SHAPES)}, ""),
    "toy_angular": ("fine-grained", _ANGULAR, _SHAPE, lambda y: {
        "shape": np.array([SHAPES.index(name) for name in _ANGULAR])[y]}, ""),
    "toy_backdrop": ("misc", ["light", "dark"], ["a shape on a {c} background"],
                     lambda y: {"tone": 2 * y}, ""),
}
RETRIEVAL = {"toy_objects": 0.0, "toy_scenes": 1.0}  # share of scenes with several objects
SETS = (*CLASSIFICATION, *RETRIEVAL)


# --------------------------------------------------------------------------------- files

def generator(seed, part, block):
    """The generator of one block of a part: any process can draw any block, in any order."""
    return np.random.default_rng([seed, *part.encode(), block])


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=0)  # decoded in 0.13 ms
    return file.getvalue()


def write_pairs(folder, config, block, n):
    """One shard: pairs whose captions may be wrong, or, held out, one to five right ones."""
    rng = generator(config.seed, folder.name, block)
    scenes = draw_scenes(rng, n)
    if folder.name == "held_out":
        texts = caption(scenes, rng, most=5)
    else:
        texts = caption(scenes, rng, config.captions, config.captions, config.wrong)
    members = []
    for i, image in enumerate(render(scenes, rng)):
        members.append((f"{block:05}{i:04}.jpg", jpeg(image)))
        members.append((f"{block:05}{i:04}.txt", "\n".join(texts[i]).encode()))
    tars.write_tar(folder / f"{block:05}.tar", members)


def write_triplets(folder, config, block, n):
    """The images of a block of triplets; returns its rows of data.csv."""
    ref, left, right, right_nearer, votes = draw_triplets(config.seed, block, n)
    rng = generator(config.seed, "images", block)
    ends = np.where(rng.random((n, 1)) < 0.5, [0, 1], [1, 0])  # left is not always _0
    images = [render(scenes, rng) for scenes in (ref, left, right)]
    for part in ("ref", "distort"):
        (folder / part / f"{block:03}").mkdir(parents=True)
    rows = []
    for i in range(n):
        stem, number = f"{block:03}/{i:03}", 1000 * block + i
        paths = [f"ref/{stem}.jpg"] + [f"distort/{stem}_{end}.jpg" for end in ends[i]]
        for path, side in zip(paths, images):
            (folder / path).write_bytes(jpeg(side[i]))
        split = {8: "val", 9: "test"}.get(number % 10, "train")
        # is_imagenet: NIGHTS' noun is one of ImageNet's; here, of the first six shapes
        shape, nearer = ref.shape[i, 0], int(right_nearer[i])
        prompt = with_article(f"{COLORS[ref.color[i, 0]]} {SHAPES[shape]}")
        rows.append([number, 1 - nearer, nearer, votes[i]] + paths + [split, shape < 6, prompt])
    return rows


def write_set(folder, config, name):
    """One benchmark set in tars of 50 samples."""
    rng = generator(config.seed, name, 0)
    if name in RETRIEVAL:
        kind, family, classes, prompts = "retrieval", "retrieval", [], []
        scenes = draw_scenes(rng, config.per_set, RETRIEVAL[name])
        images = render(scenes, rng)
        answers = caption(scenes, rng, 5, 5)
    else:
        kind, (family, classes, prompts, fixed, style) = "classification", CLASSIFICATION[name]
        n = len(classes) * max(round(config.per_set / len(classes)), 1)
        answers = rng.permutation(np.arange(n) % len(classes))
        images = render(draw_scenes(rng, n, many=0, **fixed(answers)), rng, style)
    samples = []
    for i, answer in enumerate(answers):
        samples.append((f"s{i:07}", "jpg", jpeg(images[i]), answer))
    path = tars.write_set(folder, name, classes, prompts, samples, family, kind, per_shard=50)
    if kind == "classification":  # which needs no saying
        os.remove(f"{path}/dataset_type.txt")


def write_vocabulary(path):
    """A .tiktoken file: 256 bytes, 256 bytes that end a word (by a NUL), whole words."""
    said = [*PLACES, *COUNTS, *THINGS, *FRAMES, "shapes objects things in at and on background"]
    for synonyms in chain(TONES, RELATIONS.values(), *WORDS.values()):
        said += synonyms
    words = {word for word in " ".join(said).split() if word.isalpha() and len(word) > 1}
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [byte + b"\0" for byte in tokens]
    tokens += [word.encode() + b"\0" for word in sorted(words)]
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        for rank, token in enumerate(tokens):
            print(b64encode(token).decode(), rank, file=file)


def draw_world(config, folder):
    """Write everything into `folder`, in blocks of 1,000 on all cores."""
    write_vocabulary(folder / "vocabulary" / "toy.tiktoken")
    jobs = [partial(write_set, folder / "benchmarks", config, name) for name in SETS]
    parts = ((write_triplets, "nights", config.triplets), (write_pairs, "pairs", config.pairs),
             (write_pairs, "pairs/held_out", config.held_out))
    for write, part, total in parts:
        for first in range(0, total, 1000):
            n = min(1000, total - first)
            jobs.append(partial(write, folder / part, config, first // 1000, n))
    rows = []
    for found in tars.in_order(operator.call, jobs, config.processes or os.cpu_count()):
        rows += found or []  # only triplets have rows
    with open(folder / "nights" / "data.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "left_vote", "right_vote", "votes", "ref_path", "left_path",
                         "right_path", "split", "is_imagenet", "prompt"))
        writer.writerows(rows)


def main(argv=None):
    config, _ = load_config(Config, globals(), argv, files=0)
    out = pathlib.Path(config.out)
    world = asdict(config) | {"out": "", "processes": 0}  # these change no byte
    if out.exists():
        if not (out / "world.json").exists():
            raise ValueError(f"out={out}: holds something that is not a toy world;"
                             " name a new folder")
        if json.loads((out / "world.json").read_text()) == world:
            print(f"{out} is complete (seed {config.seed}); delete it to draw it again")
            return
    # drawn beside its place and renamed when whole, so that no reader ever meets half a world
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted run
    draw_world(config, unfinished)
    (unfinished / "world.json").write_text(json.dumps(world, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    print(f"drew {out}: {config.pairs:,} pairs, {config.triplets:,} triplets, {len(SETS)} sets")


if __name__ == "__main__":
    run_main(main)
