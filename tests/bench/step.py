"""One training step of our CLIP and of open_clip's on the same tensors; what each trick brings.

    python -m tests.bench.step --batch=32 --dtype=bfloat16 --peer=open_clip
    python -m tests.bench.step --batch=1024 --dtype=bfloat16 --device=cuda --compile

Images and captions are random, caption lengths are not: see caption_lengths. Ours is the step of
pretrain.py (clipping included, which open_clip leaves out by default), the peer's that of its own
trainer. "plain" is ours with every trick off; each is then switched on alone, and all together.
--compile adds both, compiled. "of peak" is the nominal work of a pair, 77 text tokens, against a
large matrix product of the same dtype measured in the same rounds. Peak memory is that of a fresh
process per case: resident on CPU, of the allocator on a GPU.
"""
import contextlib
import functools
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

TRICKS = {  # as docs/speed.md names them
    "packed captions": "linear layers see real tokens only; otherwise all 77",
    "class token only": "last vision block computes one query an image",
    "end token only": "last text block computes one query a caption",
    "fused AdamW": "one kernel; otherwise torch's default",
    "patchify": "reshape and matrix product; otherwise a convolution",
    "attention": "matrix products where they are faster (bf16 on a CPU); otherwise torch's kernel",
}
ALONE = types.SimpleNamespace(rank=0, world=1, gather=lambda *rows: rows)  # a Ranks of one


# ---------------------------------------------------------------------- the tricks, switched off

def plan_of_all(tower, tokens):
    """TextTower.plan for all L tokens of each caption, padding too."""
    count, length = tokens.shape
    device, ends = tower.position_embedding.device, tokens.argmax(1)
    plan = [tokens.flatten(), torch.arange(count * length), torch.arange(count) * length + ends,
            torch.arange(length) <= ends[:, None]]
    return [tensor.to(device) for tensor in plan]


def attend_fused(q, k, v, heads, causal=False, mask=None):
    """model.attend by torch's fused kernel, whatever the device and the precision."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


def patches_convolved(tower, images):
    """The patch embedding as a convolution: images (B, 3, S, S) -> (B, N-1, D)."""
    p = tower.patch_size
    weight = tower.patch_embed.weight.view(-1, 3, p, p)                     # (D, 3, P, P)
    return F.conv2d(images, weight, stride=p).flatten(2).transpose(1, 2)


def vision_forward(tower, images, convolve, every):
    """VisionTower.forward with a convolution, and with the last block for every token."""
    if not convolve:
        x = VISION_FORWARD(tower, images, every=every)
        return x[:, 0] if every else x
    x = patches_convolved(tower, images) + tower.position_embedding[1:]
    first = tower.class_embedding + tower.position_embedding[0]
    x = tower.ln_pre(torch.cat([first.expand(len(x), 1, -1), x], 1))        # (B, N, D)
    attention = functools.partial(model.attend, heads=tower.config.vision_heads)
    x = model.run_blocks(tower.blocks[:-1], x, attention, tower.recompute)
    if every:
        x = tower.blocks[-1](x, attention)[:, 0]
    else:
        x = tower.blocks[-1].read(x[:, :1], x, attention)                   # (B, D)
    return tower.projection(tower.ln_post(x))                               # (B, E)


def text_forward(tower, tokens):
    """TextTower.forward with the last block for every token."""
    x = TEXT_FORWARD(tower, tokens, every=True)                             # (B, longest, E)
    return x[torch.arange(len(x)), tokens.argmax(1)]


VISION_FORWARD, TEXT_FORWARD = model.VisionTower.forward, model.TextTower.forward


def only(on):
    """A context in which model.py computes with the tricks named in `on` and no other."""
    def vision(tower, images):
        return vision_forward(tower, images, "patchify" not in on, "class token only" not in on)

    stack = contextlib.ExitStack()
    patch = mock.patch.object
    if not {"patchify", "class token only"} <= on:
        stack.enter_context(patch(model.VisionTower, "forward", vision))
    if "end token only" not in on:
        stack.enter_context(patch(model.TextTower, "forward", text_forward))
    if "packed captions" not in on:
        stack.enter_context(patch(model.TextTower, "plan", plan_of_all))
    if "attention" not in on:
        stack.enter_context(patch(model, "attend", attend_fused))
    return stack


def eager():
    """A context in which what is compiled runs as if it were not."""
    return torch.compiler.set_stance("force_eager")


# ------------------------------------------------------------------------------------- the step

class OurStep:
    """Our update, as in section 5 of pretrain.main; among several ranks, this rank's part."""

    def __init__(self, config, device, dtype, compiled=False, ranks=ALONE):
        self.clip = model.CLIP(config).to(device).train()
        self.ranks = ranks
        if compiled:
            self.clip.vision.compile()
            self.clip.text.compile()
        self.settings = types.SimpleNamespace(loss_chunk=0, dtype=dtype)
        self.model = pretrain.Encoder(self.clip, self.settings)
        if ranks.world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(
                self.model, gradient_as_bucket_view=True)
        self.optimizers = {fused: torch.optim.AdamW(
            model.optimizer_groups(self.clip, 0.1), lr=5e-4, betas=(0.9, 0.98), eps=1e-8,
            fused=fused or None) for fused in (True, False)}

    def __call__(self, images, tokens, mark=lambda: None, fused=True):
        """One update on (B, 3, S, S), (B, L); marks after forward, backward, clipping."""
        optimizer = self.optimizers[fused]

        def encode(batch):
            rows = self.model(batch)
            mark()
            return rows

        pretrain.whole_gradient(encode, {"views": images, "tokens": tokens}, self.settings,
                                self.ranks)
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
    args = parser.parse_args()
    if args.quick:
        args.model, args.batch, args.rounds = "toy", 8, 1
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
