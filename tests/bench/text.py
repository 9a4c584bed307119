"""Captions a second from text to token ids: data.text.Tokenizer beside open_clip's SimpleTokenizer.

    python -m tests.bench.text

Both make the (B, 77) int64 tensor that a model takes, CLIP's 49,408 tokens, on the same captions:
words of that vocabulary drawn by Zipf's law, lengths as in caption_lengths. "ascii" has capitals,
commas and numbers; in "mixed" three captions of ten have accents, Cyrillic, Chinese, emoji, HTML
entities or broken UTF-8. Both tokenizers are warm (open_clip's remembers words it has seen). The
last column counts captions with other ids; cleaning differs where text was broken (data/text.py).
"""
import random

from data.prepare.vocabulary import published_merges, read_merges, tiktoken_text
from data.text import Tokenizer
from tests.bench import caption_lengths, interleave, options, ratio, spread, start, table, totals
from tests.bench.peer import load_peer

ODD = ("café", "naïve", "Größe", "señor", "Привет", "мир", "日本語", "东京", "🌹", "👍🏽", "&amp;",
       "&lt;3", "it’s", "“quoted”", "donâ€™t", "5 €", "½", "ﬁne", "—", "…")


def draw_captions(tokenizer, count, odd_share, rng):
    """`count` captions; `odd_share` of them hold words that are not plain ASCII."""
    text = [tokenizer.decode([i]) for i in range(512, tokenizer.size - 2)]
    words = [word for word in text if word.isascii() and word.isalpha() and len(word) > 1]
    weights = [1 / (rank + 10) for rank in range(len(words))]  # merges stand by frequency
    captions = []
    for length in caption_lengths(count).tolist():
        caption = rng.choices(words, weights, k=max(length - 3, 1))
        caption[0] = caption[0].capitalize()
        for _ in range(length // 8):
            caption[rng.randrange(len(caption))] += ","
        if rng.random() < 0.2:
            caption.insert(rng.randrange(len(caption)), str(rng.randrange(2030)))
        if rng.random() < odd_share:
            caption[rng.randrange(len(caption))] = rng.choice(ODD)
        captions.append(" ".join(caption))
    return captions


def main():
    args = options(__doc__, count=20_000, batch=1024, peer="open_clip").parse_args()
    if args.quick:
        args.count, args.batch, args.rounds = 500, 100, 1
    device = start(args)
    tokenizer = Tokenizer(tiktoken_text(read_merges(published_merges())))
    open_clip, note = load_peer(args.peer)
    print(note)
    tokenizers = {"ours": tokenizer}
    if open_clip:
        tokenizers["open_clip"] = open_clip.SimpleTokenizer()

    rng, rows = random.Random(0), []
    for name, odd_share in (("ascii", 0.0), ("mixed", 0.3)):
        captions = draw_captions(tokenizer, args.count, odd_share, rng)

        def run(tokenize):
            def case(mark):
                for first in range(0, args.count, args.batch):
                    tokenize(captions[first:first + args.batch])
            return case

        laps = interleave({who: run(it) for who, it in tokenizers.items()}, args.rounds, device)
        seconds = {who: totals(rounds) for who, rounds in laps.items()}
        rates = {who: spread([args.count / s for s in values], "") for who, values in seconds.items()}
        row = [name, rates["ours"], "-", "-", "-"]
        if open_clip:
            other = (tokenizer(captions) != tokenizers["open_clip"](captions)).any(1).sum().item()
            row[2:] = (rates["open_clip"], ratio(seconds["open_clip"], seconds["ours"]),
                       f"{other} of {args.count:,}")
        rows.append(row)
    table(("text", "ours, captions/s", "open_clip, captions/s", "times", "other ids"), rows)


if __name__ == "__main__":
    main()
