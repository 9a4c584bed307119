"""What is nearest to a text or an image, and which label fits: evaluate.py --query, --image."""
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import BadImage, decode
from data.shards import Shards, index_shards


class Pool:
    """Images and captions to search in; what Pixels of evaluate.py takes."""

    def __init__(self, images, captions):
        self.images, self.captions = images, captions

    def __len__(self):
        return len(self.images)

    def image(self, i):
        return self.images[i]


def read_pool(folder, count):
    """The first `count` pairs of a folder, as far as they are readable, with first captions."""
    index_shards(folder)
    shards, images, captions = Shards(folder), [], []
    count = min(count, len(shards))
    for i in range(count):
        content, lines = shards[i]
        try:
            images.append(decode(content))
        except BadImage:
            continue
        captions.append(lines[0])
    print(f"{folder}: searching {len(images)} images of {len(shards)}, "
          f"{count - len(images)} unreadable ones left out")
    return Pool(images, captions)


def read_image(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image={path}: no such file")
    try:
        return decode(Path(path).read_bytes())
    except BadImage as error:
        raise ValueError(f"image={path}: {error}") from None


def look(paths, open_model, config):
    """Draw what each checkpoint finds nearest to --query or --image: <out>/query.png.

    With --labels print what each makes of the image; without --images nothing is drawn.
    paths: {name: checkpoint}.  open_model(path) -> evaluate.Model.
    """
    asked = read_image(config.image) if config.image else None
    if config.labels:
        for name, path in paths.items():
            print_labels(name, open_model(path), asked, config.labels.split(","))
    if config.images:
        draw_nearest(paths, open_model, asked, config)


def print_labels(name, model, asked, labels):
    """Probabilities of the labels for one image, the likeliest first: softmax of logits."""
    if model.tokenizer is None:
        raise ValueError(f"{model.path}: has no text side (stage 1), or no vocabulary; give "
                         "--vocabulary=FILE")
    labels = [label.strip() for label in labels]
    image = model.embed_images(Pool([asked], [""]))[0]                  # (E,)
    texts = model.embed_texts(labels)                                   # (C,E)
    probabilities = (model.clip.logit_scale.exp().cpu() * texts @ image).softmax(0)  # (C,)
    for i in probabilities.argsort(descending=True).tolist():
        print(f"{name}: {100 * probabilities[i]:5.1f} %  {labels[i]}")


def draw_nearest(paths, open_model, asked, config):
    """<out>/query.png: of each checkpoint the pool's pairs nearest to the text or image."""
    pool = read_pool(config.images, config.pool)
    rows = []
    for name, path in paths.items():
        model = open_model(path)
        if config.query:
            if model.tokenizer is None:
                raise ValueError(f"{path}: has no text side (stage 1), or no vocabulary; "
                                 "use --image=FILE, or give --vocabulary=FILE")
            text = model.embed_texts([config.query])[0]                 # (E,)
            rows.append((f"{name}: images", model.embed_images(pool) @ text))
        if asked:
            rows += nearest_to_image(name, model, asked, pool)
    target = os.path.join(config.out, "query.png")
    draw_rows(config.query or config.image, asked, rows, pool).save(target)
    print(f"nearest to {config.query or config.image}: {target}")


def nearest_to_image(name, model, asked, pool):
    """[(label, similarities (n,))]: of the pool's images and, if it has text, its captions."""
    query = model.embed_images(Pool([asked], [""]))[0]                  # (E,)
    rows = [(f"{name}: images", model.embed_images(pool) @ query)]
    if model.tokenizer:
        rows.append((f"{name}: captions", model.embed_texts(pool.captions) @ query))
    return rows


def draw_rows(title, asked, rows, pool, side=128, columns=8):
    """A picture: for each (label, similarities (n,)) the most similar pairs, best first."""
    font, line, top = ImageFont.load_default(12), 16, 32  # pixels
    height = side + 5 * line  # of a row: its name, its images, three lines of caption, a gap
    size = (columns * (side + 8) + 8, top + height * (len(rows) + bool(asked)))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), f"nearest to: {title}", "black", font)
    if asked:
        sheet.paste(ImageOps.contain(asked, (side, side)), (8, top))
        top += height
    for label, similar in rows:
        pen.text((8, top), label, "black", font)
        for column, i in enumerate(similar.topk(min(columns, len(pool))).indices.tolist()):
            left = 8 + column * (side + 8)
            caption = textwrap.wrap(f"{similar[i]:.2f} {pool.captions[i]}", 21)[:3]
            sheet.paste(ImageOps.contain(pool.image(i), (side, side)), (left, top + line))
            pen.multiline_text((left, top + line + side + 2), "\n".join(caption), "black", font)
        top += height
    return sheet
