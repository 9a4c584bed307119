"""Images a second that the loader makes, beside the usual route, and what the device part adds.

    python -m tests.bench.loader --threads=1                # one process and all cores, CPU
    python -m tests.bench.loader --device=cuda --compile    # the device part on a GPU

Self-drawn JPEGs, short side 256, quality 90, in one tar shard; crops of 224; both augmentations.
The usual route is what torchvision does with Pillow images, written out with Pillow alone: crop,
resize, jitter, grey, blur, flip, float, normalise, all on the host, one image after the other. It
reads its images as ours does, by pread; where webdataset is installed (pip install webdataset) the
same transforms are also fed by it, in one process. Ours is `Pairs`: the shard is read, the image
decoded, cropped and resized to uint8, the caption's ids laid out; flip, jitter, grey, blur and
normalise are the device part, its cost beside it. On a CPU that part is no gain, on a GPU it is:
--device=cuda measures it.
"""
import io
import math
import os
import random
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset

from data.images import MEAN, STD, Augmentation, augment_batch
from data.pairs import PairBatches, Pairs, as_loaded
from data.prepare.tars import write_shards
from data.shards import Shards, index_shards
from tests.bench import interleave, options, ratio, spread, start, table, totals

PLAIN = Augmentation(crop=(0.9, 1.0))
PAPER = Augmentation(crop=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8,
                     grey_p=0.2, blur_p=0.5)


class Words:
    """A stand-in for data.text.Tokenizer: ids are letters. Captions are not what is measured."""

    fingerprint, size, start, end = "letters", 258, 256, 257

    def encode(self, captions):
        return [list(caption.encode()) for caption in captions]


def pairs_of(folder, augmentation):
    """data.pairs.Pairs of a folder of shards at 224 pixels, with the first caption of each."""
    index_shards(folder, Words())
    settings = types.SimpleNamespace(image_size=224, seed=0, context_length=77)
    return Pairs(Shards(folder, Words()), Words(), settings, augmentation, lambda count, rng: 0)


def draw_jpeg(rng):
    """A 341 x 256 picture of coloured 1/f noise and shapes: a JPEG of about 30 kB."""
    white = np.fft.rfft2(rng.normal(size=(3, 256, 341)))                           # (3, 256, 171)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(341)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(white / frequency**1.2, (256, 341))                      # (3, 256, 341)
    noise = 128 + 45 * (noise - noise.mean()) / noise.std()
    picture = Image.fromarray(noise.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    draw = ImageDraw.Draw(picture)
    for x, y, size, *colour in rng.integers((341, 256, 80, 256, 256, 256), size=(8, 6)).tolist():
        draw.ellipse((x, y, x + size, y + size), fill=tuple(colour))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


# ---------------------------------------------------------------- the usual route

class UsualRoute(Dataset):
    """The same pairs by torchvision's transforms for Pillow images, written out."""

    def __init__(self, pairs, augmentation):
        self.shards, self.augmentation = pairs.shards, augmentation

    def __len__(self):
        return len(self.shards)

    def __getitems__(self, places):
        return torch.stack([self.transform(self.shards.image(i)) for _, i in places])

    def transform(self, data):
        """Bytes -> float (3, 224, 224)."""
        return self.of_image(Image.open(io.BytesIO(data)).convert("RGB"))

    def of_image(self, image):
        """Pillow RGB -> float (3, 224, 224)."""
        used = self.augmentation
        image = resized_crop(image, used.crop, used.ratio)
        if random.random() < used.jitter_p:
            image = colour_jitter(image, used.jitter)
        if random.random() < used.grey_p:
            image = image.convert("L").convert("RGB")
        if random.random() < used.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*used.blur_sigma)))
        if random.random() < used.flip:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def resized_crop(image, area, ratio):
    """Pillow image -> a random crop of it, 224 x 224, bicubic."""
    width, height = image.size
    for _ in range(10):
        pixels = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if w <= width and h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            image = image.crop((left, top, left + w, top + h))
            break
    return image.resize((224, 224), Image.Resampling.BICUBIC)


def colour_jitter(image, reaches):
    """Pillow image -> brightness, contrast, saturation and hue changed in random order."""
    for which in random.sample(range(4), 4):
        if which == 3:
            hue, saturation, value = image.convert("HSV").split()
            turned = np.array(hue) + np.uint8(round(255 * random.uniform(0, reaches[3])))
            image = Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
            image = enhance(image).enhance(1 + random.uniform(-reaches[which], reaches[which]))
    return image


def webdataset_pass(folder, transform, batch_size):
    """A case: one pass of webdataset over the shards, decoded by it; None without the package."""
    try:
        import webdataset
    except ImportError:
        return None

    def run(mark):
        shards = sorted(map(str, Path(folder).glob("*.tar")))
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb")
        for _ in samples.to_tuple("jpg", "txt").map_tuple(transform, str).batched(batch_size):
            pass
    return run


# ---------------------------------------------------------------- measuring

def one_process(dataset, places, batch_size):
    """A case: one pass over the pictures."""
    def run(mark):
        for at in range(0, len(places), batch_size):
            dataset.__getitems__(places[at:at + batch_size])
    return run


def all_cores(dataset, steps, batch_size, workers):
    """A case: `steps` batches from worker processes; the mark comes once all of them are warm."""
    warm = 2 * workers + 2

    def run(mark):
        order = PairBatches(len(dataset), batch_size, 0, 1, 0, warm + steps)
        loader = iter(DataLoader(dataset, batch_sampler=order, collate_fn=as_loaded,
                                 num_workers=workers))
        for step in range(warm + steps):
            if step == warm:
                mark()
            next(loader)
    return run


def on_device(pairs, places, device, compiled):
    """A case: one batch on the device."""
    batch = pairs.__getitems__(places)
    images, draws = batch["images"].to(device), batch["draws"].to(device)
    augment = torch.compile(augment_batch) if compiled else augment_batch
    return lambda mark: augment(images, draws, pairs.augmentation)


def main():
    parser = options(__doc__, count=512, batch=64)
    parser.add_argument("--compile", action="store_true", help="torch.compile the device part")
    args = parser.parse_args()
    if args.quick:
        args.count, args.batch, args.rounds = 32, 8, 1
    device = start(args)
    places, workers = [(0, i) for i in range(args.count)], os.cpu_count()
    steps = args.count // args.batch
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, ((f"{i:04d}", "jpg", draw_jpeg(rng), ["a caption of usual length"])
                              for i in range(args.count)), args.count)
        routes = {}  # (augmentation, route): data set
        for name, augmentation in (("plain", PLAIN), ("paper", PAPER)):
            pairs = pairs_of(folder, augmentation)
            routes |= {(name, "usual"): UsualRoute(pairs, augmentation), (name, "ours"): pairs}
        alone = {key: one_process(dataset, places, args.batch) for key, dataset in routes.items()}
        for name in ("plain", "paper"):
            tar_route = webdataset_pass(folder, routes[name, "usual"].of_image, args.batch)
            alone |= {(name, "webdataset"): tar_route} if tar_route else {}
        together = {key: all_cores(dataset, steps, args.batch, workers)
                    for key, dataset in routes.items()}
        added = {name: on_device(routes[name, "ours"], places[:args.batch], device, args.compile)
                 for name in ("plain", "paper")}
        alone, together, added = (interleave(cases, args.rounds, device)
                                  for cases in (alone, together, added))

    def row(name, processes, laps):
        """Seconds of the last phase -> images a second of each route, and how many times more."""
        seconds = {route: [lap[-1] for lap in laps[name, route]]
                   for route in ("ours", "usual", "webdataset") if (name, route) in laps}
        cells = [spread([steps * args.batch / s for s in seconds["ours"]], "")]
        for route in ("usual", "webdataset"):
            found = seconds.get(route)
            cells.append(found and spread([steps * args.batch / s for s in found], "") or "-")
            cells.append(ratio(found, seconds["ours"]) if found else "-")
        device_part = [s / args.batch for s in totals(added[name])]
        return (name, processes, *cells, spread(device_part, "us"))

    table(("augmentation", "processes", "ours, images/s", "usual route", "times", "with webdataset",
           "times", f"device part, {device.type}, an image"),
          [row(name, *where) for name in ("plain", "paper")
           for where in ((1, alone), (f"{workers} workers", together))])


if __name__ == "__main__":
    main()
