"""One training step of our CLIP and of open_clip's on the same tensors; what each trick brings.

    python -m tests.bench.step --batch=32 --dtype=bfloat16 --peer=open_clip
    python -m tests.bench.step --batch=1024 --dtype=bfloat16 --device=cuda --compile

Images and captions are random, caption lengths are not: see caption_lengths. Ours is the step of
pretrain.py (clipping included, which open_clip leaves out by default), the peer's that of its own
trainer. "plain" is ours with every trick off; each is then switched on alone, and all together.
--compile adds both, compiled. "of peak" is the nominal work of a pair, 77 text tokens, against a
large matrix product of the same dtype measured in the same rounds. Peak memory is that of a fresh
process per case: resident on CPU, of the allocator on a GPU. --trim gives freed memory back to the
system, as glibc does by itself once large blocks were freed, instead of keeping it (configs).
"""
import contextlib
import ctypes
import json
import math
import resource
import statistics
import types
from unittest import mock

import torch
import torch.nn.functional as F

import model
import pretrain
from tests.bench import (caption_lengths, fresh, interleave, make_batch, options, ratio, spread,
                         start, table, totals)
from tests.bench.peer import PeerStep, load_peer

TRICKS = {  # what README calls the tricks
    "text chunks": "captions sorted, cut in chunks; otherwise all 77 tokens",
    "class token only": "last vision block computes one query an image",
    "end token only": "last text block computes one query a caption",
    "fused AdamW": "one kernel; otherwise torch's default",
    "patchify": "reshape and matrix product; otherwise a convolution",
    "attention": "matrix products where they are faster (bf16 on a CPU); otherwise torch's kernel",
}
ALONE = types.SimpleNamespace(rank=0, world=1)  # a data.ranks.Ranks without other ranks


# ---------------------------------------------------------------------- the tricks, switched off

def padded(tower, tokens):
    """TextTower.without_padding's results for all L tokens of each caption, in the given order."""
    count, length = tokens.shape
    device, order, ends = tower.position_embedding.device, torch.arange(count), tokens.argmax(1)
    ids, rows, ends, order = (
        t.to(device) for t in (tokens.flatten(), order * length + ends, ends, order))
    x = tower.token_embedding(ids) + tower.position_embedding[:length].repeat(count, 1)  # (B*L, D)
    return x, ((count, length),), rows, ends, order


def read_whole(block, x, spans, rows, ends=None):
    """Block.read's result the plain way: every token through the block, then the rows (B,)."""
    return block(x, spans, ends is not None).index_select(0, rows)  # (B, D)


def forward_convolved(tower, images):
    """VisionTower.forward with the patch embedding as a convolution."""
    size, p = len(images), tower.patch_size
    weight = tower.patch_embed.weight.view(-1, 3, p, p)                     # (D, 3, P, P)
    x = F.conv2d(images, weight, stride=p).flatten(2).transpose(1, 2)       # (B, N-1, D)
    x = torch.cat([tower.class_embedding.expand(size, 1, -1), x], 1) + tower.position_embedding
    tokens = x.shape[1]
    x = tower.ln_pre(x).flatten(0, 1)                                       # (B*N, D)
    rows = torch.arange(0, size * tokens, tokens, device=x.device)
    x = model.run_blocks(tower, x, ((size, tokens),), rows)                 # (B, D)
    return tower.projection(tower.ln_post(x))                               # (B, E)


def attend_fused(qkv, spans, heads, causal):
    """model.attend by torch's fused kernel, whatever the device and the precision."""
    mixed = []
    for part, (count, length) in zip(qkv.split([n * m for n, m in spans]), spans):
        q, k, v = part.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (count, H, length, d)
        mixed.append(y.transpose(1, 2).reshape(count * length, -1))
    return torch.cat(mixed)                                             # (T, D)


def only(on):
    """A context in which model.py computes with the tricks named in `on` and no other."""
    read = model.Block.read

    def read_some(block, x, spans, rows, ends=None):
        quick = ("class token only" if ends is None else "end token only") in on
        return (read if quick else read_whole)(block, x, spans, rows, ends)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(model.Block, "read", read_some))
    if "text chunks" not in on:
        stack.enter_context(mock.patch.object(model.TextTower, "without_padding", padded))
    if "attention" not in on:
        stack.enter_context(mock.patch.object(model.Block, "attention", staticmethod(attend_fused)))
    if "patchify" not in on:
        stack.enter_context(mock.patch.object(model.VisionTower, "forward", forward_convolved))
    return stack


def eager():
    """A context in which what is compiled runs as if it were not."""
    return torch.compiler.set_stance("force_eager")


# ------------------------------------------------------------------------------------- the step

class OurStep:
    """Our update, as in section 5 of pretrain.main; among several ranks, this rank's part."""

    def __init__(self, config, device, dtype, compiled=False, ranks=ALONE):
        self.clip = model.CLIP(config).to(device).train()
        self.device, self.bf16, self.ranks = device, dtype == "bfloat16", ranks
        if compiled:
            self.clip.vision.compile()
            self.clip.text.compile()
        self.model = self.clip if ranks.world == 1 else torch.nn.parallel.DistributedDataParallel(
            self.clip, gradient_as_bucket_view=True)
        self.settings = types.SimpleNamespace(micro_batch=0, loss_chunk=0, exact_negatives=True)
        self.optimizers = {fused: torch.optim.AdamW(
            model.optimizer_groups(self.clip, 0.1), lr=5e-4, betas=(0.9, 0.98), eps=1e-8,
            fused=fused or None) for fused in (True, False)}

    def __call__(self, images, tokens, mark=lambda: None, fused=True):
        """One update on (B, 3, S, S), (B, L); marks after forward, backward, clipping."""
        optimizer = self.optimizers[fused]

        def embed(rows):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                output = self.model(images[rows], tokens[rows])
            mark()
            return output

        pretrain.accumulate_gradient(self.model, embed, len(images), self.settings, self.ranks)
        mark()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.clip.parameters(), 3.0)
        mark()
        if fused:
            optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        self.clip.logit_scale.data.clamp_(max=math.log(100))


def peak_product(device, dtype, quick):
    """A case that multiplies two square matrices, and the operations of one such product."""
    side = 256 if quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda mark: torch.mm(a, b), 2 * side ** 3


def our_cases(args, config, device, images, tokens):
    """{name: run(mark)} of ours: plain, each trick alone, all together, all compiled."""
    ours = OurStep(config, device, args.dtype, args.compile)

    def run(on):
        def case(mark):
            with only(on), eager():
                ours(images, tokens, mark, "fused AdamW" in on)
        return case

    cases = {"plain": run(set())}
    if not args.totals:
        cases |= {f"+ {name}": run({name}) for name in TRICKS}
    cases["all"] = run(set(TRICKS))
    if args.compile:
        cases["all, compiled"] = lambda mark: ours(images, tokens, mark)
    return cases


def peer_cases(args, config, device, images, tokens):
    """{name: run(mark)} of open_clip, and of open_clip compiled."""
    peer = PeerStep(load_peer()[0], config, device, args.dtype, args.compile)

    def case(mark):
        with eager():
            peer(images, tokens, mark)
    compiled = {"open_clip, compiled": lambda mark: peer(images, tokens, mark)}
    return {"open_clip": case} | (compiled if args.compile else {})


def alone(args, name):
    """One case in a process of its own: {"seconds", "bytes"} of its second step, its peak."""
    return fresh("tests.bench.step", f"--device={args.device}", f"--model={args.model}",
                 f"--batch={args.batch}", f"--dtype={args.dtype}", f"--threads={args.threads}",
                 f"--alone={name}", *(["--compile"] if "compiled" in name else []))


def measure_alone(args, device, config, images, tokens):
    """The child of `alone`: two steps, for AdamW's moments come with the first."""
    args.totals = True
    make = peer_cases if args.alone.startswith("open_clip") else our_cases
    cases = make(args, config, device, images, tokens)
    laps = interleave({args.alone: cases[args.alone]}, 1, device)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(json.dumps({"seconds": totals(laps[args.alone])[0], "bytes": peak}))


def main():
    parser = options(__doc__, model="ViT-B-32", batch=32, dtype="bfloat16", peer="open_clip",
                     alone="")
    parser.add_argument("--compile", action="store_true", help="also all tricks, compiled")
    parser.add_argument("--totals", action="store_true", help="only plain, all, peer; no memory")
    parser.add_argument("--trim", action="store_true", help="freed memory goes back to the system")
    args = parser.parse_args()
    if args.quick:
        args.model, args.batch, args.rounds = "toy", 8, 1
    if args.trim:  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: where glibc's own rise to
        for what, value in ((-3, 32 << 20), (-1, 64 << 20)):
            ctypes.CDLL(None).mallopt(what, value)
    device, config = start(args), model.SIZES[args.model]
    images, tokens = make_batch(config, args.batch, device)
    if args.alone:
        return measure_alone(args, device, config, images, tokens)
    lengths = caption_lengths(args.batch, config.context_length)
    print(f"{args.model}, batch {args.batch}, {args.dtype}; caption tokens: mean "
          f"{lengths.float().mean():.1f}, median {lengths.median()}, longest {lengths.max()} of "
          f"{config.context_length}")

    # ---- memory, each case in its own process; then all cases in the same rounds
    open_clip, note = load_peer(args.peer)
    print(note, flush=True)
    whole = ["plain", "all"] + ["all, compiled"] * args.compile
    if open_clip:
        whole += ["open_clip"] + ["open_clip, compiled"] * args.compile
    gib = {} if args.totals else {name: f"{alone(args, name)['bytes'] / 2**30:.2f}"
                                  for name in whole}
    cases = our_cases(args, config, device, images, tokens)
    if open_clip:
        cases |= peer_cases(args, config, device, images, tokens)
    cases["product"], operations = peak_product(device, getattr(torch, args.dtype), args.quick)
    laps = interleave(cases, args.rounds, device, warmup=1 + args.compile)
    peak = operations / statistics.median(totals(laps.pop("product")))

    # ---- the table
    plain, rows = totals(laps["plain"]), []
    against = totals(laps["open_clip"]) if open_clip else None
    for name, rounds in laps.items():
        seconds = totals(rounds)
        parts = [f"{statistics.median(part) * 1e3:,.0f}" for part in zip(*rounds)]
        rate = args.batch / statistics.median(seconds)
        rows.append([name, spread(seconds, "ms"), *parts, f"{rate:,.1f}", ratio(plain, seconds),
                     ratio(against, seconds) if against else "-",
                     f"{rate * model.flops_per_pair(config) / peak:.0%}",
                     gib.get(name, "")])
    print(f"matrix product peak: {peak / 1e9:,.0f} GFLOP/s; nominal work of a pair: "
          f"{model.flops_per_pair(config) / 1e9:.1f} GFLOP")
    table([f"{args.model}, batch {args.batch}, {args.dtype}", "step", "forward", "backward",
           "clipping", "AdamW", "pairs/s", "x plain", "x open_clip", "of peak", "peak GiB"], rows)


if __name__ == "__main__":
    main()
