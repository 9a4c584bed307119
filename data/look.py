"""Pairs to search in, and the picture of what was found: evaluate.py --query and --image."""
import textwrap
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw, ImageFont, ImageOps

from data.images import BadImage, decode
from data.shards import Shards, index_shards


class Pool:
    """The first pairs of a folder, as far as they are readable: images, and first captions."""

    def __init__(self, folder, count):
        index_shards(folder)
        shards, threads = Shards(folder), ThreadPoolExecutor()
        count = min(count, len(shards))
        pairs = list(filter(None, threads.map(lambda i: read_pair(shards, i), range(count))))
        print(f"{folder}: searching {len(pairs)} images of {len(shards)}, "
              f"{count - len(pairs)} unreadable ones left out")
        self.images, self.captions = map(list, zip(*pairs))

    def __len__(self):
        return len(self.images)

    def image(self, i):
        return self.images[i]


def read_pair(shards, i):
    """(Pillow image, caption) of pair i, None if the image is unreadable."""
    content, captions = shards[i]
    try:
        return decode(content), captions[0]
    except BadImage:
        return None


def draw_rows(title, asked, rows, pool, side=128, columns=8):
    """A picture: for each (label, similarities (n,)) the most similar pairs, best first."""
    font, line = ImageFont.load_default(12), 16  # pixels
    height = side + 5 * line  # of a row: its name, its images, three lines of caption, a gap
    top = 2 * line + (side + line if asked else 0)  # below the title and the image asked for
    size = columns * (side + 8) + 8, top + len(rows) * height
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 8), f"nearest to: {title}", "black", font)
    if asked:
        sheet.paste(ImageOps.contain(asked, (side, side)), (8, 2 * line))
    for label, similar in rows:
        pen.text((8, top), label, "black", font)
        for column, i in enumerate(similar.topk(min(columns, len(pool))).indices.tolist()):
            left, caption = 8 + column * (side + 8), f"{similar[i]:.2f} {pool.captions[i]}"
            sheet.paste(ImageOps.contain(pool.image(i), (side, side)), (left, top + line))
            pen.multiline_text((left, top + line + side + 2),
                               "\n".join(textwrap.wrap(caption, 21)[:3]), "black", font)
        top += height
    return sheet
