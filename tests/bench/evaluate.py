"""Evaluation's two passes beside open_clip's: images/s and prompts/s, float32 and bfloat16.

    python -m tests.bench.evaluate                       # ViT-B-32 on the CPU, about 10 minutes
    python -m tests.bench.evaluate --device=cuda --images=4096 --prompts=8000 --batch=512

Both have random weights of the same sizes. Images: ours is what evaluate.py runs from uint8 pixels
on (normalise, encode, unit length, to the host); the peer's is encode_image on pixels normalised
beforehand. Prompts: both from text on, with their own tokenizers; the prompts are ImageNet-like,
5 to 20 tokens long, which open_clip pads to 77. open_clip is optional (tests/bench/peer.py).
"""
import itertools

import torch

import evaluate
from data.text import Tokenizer
from model import CLIP, SIZES
from tests.bench import interleave, options, ratio, spread, start, table, totals
from tests.bench.peer import load_peer, peer_clip

THINGS = ("dog", "golden retriever", "tabby cat", "great white shark", "hen", "fire salamander",
          "soccer ball", "school bus", "acoustic guitar", "red wine", "valley", "cliff", "hay",
          "coral reef", "daisy", "bolete", "pizza", "burrito", "street sign", "traffic light",
          "space heater", "electric fan", "coffee mug", "measuring cup", "teddy bear")
KINDS = ("", "red ", "small blue ", "very old ", "shiny ", "wooden ", "yellow and green ", "tiny ")
TEMPLATES = ("a photo of a {}.", "a bad photo of a {}.", "a sculpture of a {}.", "art of a {}.",
             "a photo of the hard to see {}.", "a low resolution photo of the {}.", "itap of a {}.",
             "a black and white photo of the {}.", "the origami {}.", "a {} in a video game.")


class Fixed:
    """The same random picture `count` times, as evaluate.embed takes them."""

    def __init__(self, count, size):
        self.count = count
        self.pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)

    def __len__(self):
        return self.count

    def __getitems__(self, rows):
        return self.pixels.repeat(len(rows), 1, 1, 1)  # each in memory of its own, as pinning wants


def prompts_of(count):
    """`count` distinct prompts (at most 2,000)."""
    every = [template.format(kind + thing) for kind, thing, template
             in itertools.product(KINDS, THINGS, TEMPLATES)]
    return every[:count]


def image_cases(clip, peer, args, device):
    """{name: run} of the image pass."""
    size = clip.config.image_size
    items = Fixed(args.images, size)
    batches = torch.randn(args.batch, 3, size, size, device=device).expand(
        args.images // args.batch, -1, -1, -1, -1)

    def theirs(dtype):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
            for batch in batches:
                peer.encode_image(batch, normalize=True).float().cpu()
    cases = {}
    for dtype in ("float32", "bfloat16"):
        cases["ours", dtype] = lambda mark, dtype=dtype: evaluate.embed(
            clip.encode_image, items, device, args.batch, dtype=dtype)
        if peer:
            cases["open_clip", dtype] = lambda mark, dtype=dtype: theirs(dtype)
    return cases


def text_cases(clip, tokenizer, peer, peer_tokenizer, args, device):
    """{name: run} of the text pass."""
    prompts = prompts_of(args.prompts)

    def theirs(dtype):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
            for i in range(0, len(prompts), args.batch):
                tokens = peer_tokenizer(prompts[i:i + args.batch]).to(device)  # (b,77)
                peer.encode_text(tokens, normalize=True).float().cpu()
    cases = {}
    for dtype in ("float32", "bfloat16"):
        cases["ours", dtype] = lambda mark, dtype=dtype: evaluate.embed_texts(
            clip, tokenizer, prompts, {}, device, dtype=dtype)
        if peer:
            cases["open_clip", dtype] = lambda mark, dtype=dtype: theirs(dtype)
    return cases


def report(what, count, seconds):
    """Rows of the table: rates of both, and how many times ours is as fast."""
    rows = []
    for dtype, other in (("float32",) * 2, ("bfloat16",) * 2, ("bfloat16", "float32")):
        ours, theirs = seconds["ours", dtype], seconds.get(("open_clip", other))
        rates = [spread([count / s for s in side], "") if side else "-" for side in (ours, theirs)]
        precisions = dtype if dtype == other else f"{dtype}, open_clip in {other}"
        rows.append([what, precisions, *rates, ratio(theirs, ours) if theirs else "-"])
    return rows


def main():
    parser = options(__doc__, model="ViT-B-32", images=128, prompts=256, batch=32,
                     vocabulary="data/clip.tiktoken", peer="open_clip")
    args = parser.parse_args()
    if args.quick:
        args.images, args.prompts, args.batch, args.rounds = 8, 16, 4, 1
    device, (open_clip, line) = start(args), load_peer(args.peer)
    print(line)
    tokenizer = Tokenizer(args.vocabulary)
    clip = CLIP(SIZES[args.model]).to(device).eval()
    peer = peer_clip(open_clip, SIZES[args.model]).to(device).eval() if open_clip else None
    lengths = (tokenizer(prompts_of(args.prompts)) != 0).sum(1).float()
    print(f"{args.prompts} prompts of {lengths.mean():.1f} tokens (longest {int(lengths.max())}), "
          f"{args.images} images in batches of {args.batch}")
    rows = []
    for what, count, cases in (
            ("images/s", args.images, image_cases(clip, peer, args, device)),
            ("prompts/s", args.prompts, text_cases(
                clip, tokenizer, peer, open_clip and open_clip.tokenize, args, device))):
        laps = interleave(cases, args.rounds, device)
        rows += report(what, count, {name: totals(runs) for name, runs in laps.items()})
    table(["pass", "precision", "ours", "open_clip", "times as fast"], rows)


if __name__ == "__main__":
    main()
