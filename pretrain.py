"""Stage 2: contrastive language-image pretraining, from one CPU to many GPUs.

    python pretrain.py configs/toy.py
    torchrun --nproc_per_node=8 pretrain.py configs/yfcc.py

In: tar shards of image-caption pairs, a vocabulary and, for perceptual initialization, the vision
tower of stage 1 (init_vision). Out: out_dir/ckpt.pt (newest), samples_*.pt (milestones), log.jsonl,
bad_samples.tsv and record/. The same command, given again, goes on where the last one stopped.
Letters as in model.py; B is the global batch, b this rank's share of it.
"""
import contextlib
import dataclasses
import math
import os
import resource
import time

from configs import check_ranges, load_config  # before torch: see there
import torch
import torch.nn.functional as F

from data.benchmarks import find_sets
from data.images import Augmentation, augment_batch
from data.log import (RunLog, check_resume, clock, keep_previous, run_main, stop_on_signals,
                      write_record)
from data.pairs import BadSamples, BadSteps, HeldOut, PairBatches, Pairs, load_batches
from data.ranks import GatherRows, Ranks
from data.text import Tokenizer
from evaluate import Pixels, embed, embed_texts, evaluate_set, retrieve
from model import (CLIP, FORMAT, SIZES, flops_per_pair, load_vision, optimizer_groups,
                   peak_flops, read_checkpoint, weights_checksum, write_checkpoint)

# What may differ when a run goes on: it does not change what is learnt. (Of data and vocabulary
# only the path may: their content is compared.)
MAY_CHANGE = {"data", "held_out", "vocabulary", "benchmarks", "workers", "micro_batch", "compile",
              "loss_chunk", "recompute", "log_every", "log_to", "profile", "eval_every",
              "save_every", "keep_last", "keep_at", "resume"}


@dataclasses.dataclass
class Config:
    # data
    data: str = "data/yfcc15m"            # folder of tar shards (data/shards.py)
    held_out: str = ""                    # folder of pairs never trained on, for loss and recall
    vocabulary: str = "data/clip.tiktoken"
    benchmarks: str = ""                  # folder of zero-shot sets to watch; they select nothing
    out_dir: str = "out/yfcc"
    workers: int = 8                      # loader processes of each rank; 0 loads in the loop
    overfit: int = 0                      # train on this many pairs only, unaugmented; 0: on all
    # model
    model: str = "ViT-B-32"               # a key of model.SIZES
    image_size: int = 224                 # pixels
    context_length: int = 77              # tokens
    quick_gelu: bool = False              # OpenAI's activation; GELU otherwise
    init_vision: str = ""                 # checkpoint of perceptual_init.py; "" starts at random
    # augmentation (data/images.py): the host crops, the device does the rest
    crop: tuple = (0.9, 1.0)              # area of the random resized crop, as a share
    flip: float = 0.0                     # probability of a horizontal flip
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.0                 # probability of the jitter
    grey_p: float = 0.0                   # probability of greyscale
    blur_p: float = 0.0                   # probability of a Gaussian blur
    blur_sigma: tuple = (0.1, 2.0)        # pixels
    # batch
    batch_size: int = 8192                # pairs that see each other, over all ranks
    micro_batch: int = 0                  # pairs in memory at once on a rank; 0: its whole share
    exact_negatives: bool = True          # False: micro-batches do not see each other (the paper)
    loss_chunk: int = 0                   # rows of logits held at once; 0: all rows of the rank
    # optimization
    epochs: int = 32
    max_steps: int = 0                    # optimizer steps; 0: by epochs
    warmup_steps: int = 2500
    lr: float = 5e-4                      # peak
    min_lr: float = 0.0                   # of the last step
    decay: str = "cosine"                 # or "constant"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    grad_clip: float = 3.0                # norm of the whole gradient; 0: no clipping
    seed: int = 42
    dtype: str = "bfloat16"               # of autocast; "float32" for none
    compile: bool = True                  # torch.compile the towers and the augmentation
    recompute: bool = False               # activation checkpointing: memory for a third more time
    # log and files
    log_every: int = 50                   # steps; the only steps at which the host waits
    log_to: str = ""                      # also to "tensorboard" or "wandb"
    profile: bool = False                 # write a torch trace of steps 3 to 7 to out_dir
    eval_every: int = 0                   # steps between looks at held_out and benchmarks; 0: end
    save_every: int = 1000                # steps
    keep_last: int = 1                    # newest checkpoints kept
    keep_at: tuple = ()                   # milestones kept, in samples seen, for scaling curves
    resume: bool = True                   # False: insist on an out_dir without a checkpoint

    def check(self):
        check_ranges(
            self, model=tuple(SIZES), decay=("cosine", "constant"), dtype=("bfloat16", "float32"),
            log_to=("", "tensorboard", "wandb"), positive=(
                "image_size", "context_length", "batch_size", "epochs", "lr", "eps", "log_every",
                "save_every", "keep_last"),
            not_negative=("workers", "overfit", "micro_batch", "loss_chunk", "max_steps", "min_lr",
                          "warmup_steps", "weight_decay", "grad_clip", "eval_every"))
        if 0 < self.overfit < self.batch_size:
            raise ValueError(f"overfit={self.overfit}: must be 0 or at least one batch_size")


# -------------------------------------------------------- functions that a recipe may replace

def lr_at(step, total_steps, config):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine to min_lr.

    The cosine ends at this run's own last update (SGDR, arXiv 1608.03983, without restarts).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    done = (step + 1 - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def pick_caption(count, rng):
    """Index of the caption to use among an image's `count`, drawn from the sample's generator."""
    return int(rng.integers(count))


def augment(images, draws, augmentation):
    """uint8 (b, 3, S, S), drawn parameters (b, 11) -> float32 normalised, on the device."""
    return augment_batch(images, draws, augmentation)


def contrastive_loss(image_emb, text_emb, all_image_emb, all_text_emb, scale, first_row, chunk):
    """Symmetric InfoNCE of this rank's rows against every pair (CLIP, arXiv 2103.00020, fig. 3).

    image_emb, text_emb: (b, E) unit rows of this rank, which stand at first_row of the (B, E)
    all_*; scale (): exp of the learned temperature. Returns the mean over rows, both directions.
    With chunk > 0 only chunk x B logits exist at a time: each chunk's gradient is taken at once.
    """
    @torch.enable_grad()
    def rows_loss(rows, others, scale, labels):
        return F.cross_entropy(scale * rows @ others.T, labels, reduction="sum")
    b, loss = len(image_emb), 0.0
    labels = torch.arange(first_row, first_row + b, device=image_emb.device)  # (b,)
    for inputs in ((image_emb, all_text_emb, scale), (text_emb, all_image_emb, scale)):
        if not chunk:
            loss = loss + rows_loss(*inputs, labels)
            continue
        rows, *leaves = (x.detach() for x in inputs)
        for part, label in zip(parts := rows.split(chunk), labels.split(chunk)):  # (chunk, E)
            part_loss = rows_loss(*(x.requires_grad_() for x in (part, *leaves)), label)
            part_loss.backward()  # adds to the leaves' gradients and frees the logits
            loss = loss + part_loss.detach()
        grads = torch.cat([part.grad for part in parts]), *(leaf.grad for leaf in leaves)
        # x - x.detach() is 0 and its gradient 1: the value stays, backward finds these gradients.
        loss = loss + sum(((x - x.detach()) * grad).sum() for x, grad in zip(inputs, grads))
    return loss / (2 * b)


# ------------------------------------------------------------------- the gradient, across ranks

def global_loss(image_emb, text_emb, scale, config, ranks):
    """contrastive_loss of local rows (b, E) against those of all ranks; one collective for both.

    Each rank's loss is a mean over its own rows. DDP averages the ranks' gradients, so together
    they are the gradient of the mean over all B rows: no further factor is due.
    """
    both = torch.cat([image_emb, text_emb], dim=1)                    # (b, 2E)
    everyone = GatherRows.apply(both) if ranks.world > 1 else both    # (B, 2E)
    all_image_emb, all_text_emb = everyone.chunk(2, dim=1)            # (B, E) each
    return contrastive_loss(image_emb, text_emb, all_image_emb, all_text_emb, scale,
                            ranks.rank * len(image_emb), config.loss_chunk)


def accumulate_gradient(model, embed_rows, b, config, ranks):
    """Leave in .grad the gradient of the loss over the global batch; return loss, embeddings.

    model: CLIP, or DDP around it. embed_rows: slice of the rank's b pairs -> image_emb, text_emb,
    scale. With several micro-batches this is GradCache (arXiv 2101.06983): embed all without
    a graph, take the loss and its gradient at the embeddings, embed again part by part and push
    that gradient through. With one micro-batch the first graph is kept and nothing runs twice.
    """
    micro = config.micro_batch or b
    parts = [slice(start, min(start + micro, b)) for start in range(0, b, micro)]
    # Pairs of one group see each other. The paper's code accumulates over groups of one part.
    groups = [parts] if config.exact_negatives else [[part] for part in parts]
    loss, kept = 0.0, []
    for group in groups:
        def sync(part):  # DDP averages the gradients once, in the backward of the last part
            last = part is parts[-1] or ranks.world == 1
            return contextlib.nullcontext() if last else model.no_sync()

        single = len(group) == 1
        with torch.set_grad_enabled(single), sync(group[-1]):
            outputs = [embed_rows(part) for part in group]
        leaves = [torch.cat([output[i].detach() for output in outputs]).requires_grad_()
                  for i in (0, 1)]                                    # (b of the group, E)
        leaves.append(outputs[0][2].detach().requires_grad_())        # scale
        group_loss = global_loss(*leaves, config, ranks)
        share = len(leaves[0]) / b
        grads = torch.autograd.grad(group_loss * share, leaves)
        for part, grad_image, grad_text in zip(group, *(g.split(micro) for g in grads[:2])):
            with sync(part):
                output = outputs[0] if single else embed_rows(part)
                torch.autograd.backward(output, [grad_image, grad_text, grads[2] / len(group)])
        loss = loss + group_loss.detach() * share
        kept += leaves[:2]
    return loss, torch.cat(kept[0::2]).detach(), torch.cat(kept[1::2]).detach()


# ---------------------------------------------------------------------- looking, saving, starting

@torch.no_grad()
def look(clip, tokenizer, held_out, step, config, ranks):
    """A log record of held-out and zero-shot figures; the ranks share the work, none repeats it."""
    figures, how = {"step": step, "samples": step * config.batch_size}, dict(
        device=clip.logit_scale.device, dtype=config.dtype, ranks=ranks)
    clip.eval()
    with torch.compiler.set_stance("force_eager"):  # odd batch sizes are not worth compiling
        if held_out:
            pixels = Pixels(held_out, config.image_size)
            image_emb = embed(clip.encode_image, pixels, batch_size=256, **how)        # (n, E)
            text_emb = embed_texts(clip, tokenizer, held_out.captions, {}, **how)      # (n, E)
            loss = contrastive_loss(image_emb, text_emb, image_emb, text_emb,
                                    clip.logit_scale.exp().cpu(), 0, 1024)
            recalls, _ = retrieve(image_emb, text_emb, torch.arange(len(held_out)))
            figures |= {"val_loss": loss.item(), **{f"val_{k}": v for k, v in recalls.items()}}
        for name, folder in find_sets(config.benchmarks).items() if config.benchmarks else ():
            result = evaluate_set(clip, tokenizer, folder, dtype=config.dtype, ranks=ranks)
            figures[f"zero_shot/{name}"] = result["metrics"][result["main"]]
    clip.train()
    return figures


def save(name, clip, optimizer, step, bad, data, config):
    """Write out_dir/name; milestones without optimizer state. A full disk is a warning, no end."""
    path = os.path.join(config.out_dir, name)
    content = {"format": FORMAT, "kind": "clip", "data": data, "bad": bad, "step": step,
               "samples": step * config.batch_size, "model": dataclasses.asdict(clip.config),
               "weights": clip.state_dict(), "config": dataclasses.asdict(config),
               "optimizer": optimizer.state_dict() if name == "ckpt.pt" else None,
               "vocabulary": clip.vocabulary}
    try:
        if config.keep_last > 1 and name == "ckpt.pt" and os.path.exists(path):
            keep_previous(path, config.keep_last - 1)
        write_checkpoint(path, content)
    except (OSError, RuntimeError) as error:  # torch.save makes the one of the other
        print(f"warning: {path} not written ({error}); the last one stays, the run goes on")


def load_run(path, clip, optimizer, data, config):
    """Put the run saved at `path` back; returns (step, bad counts). ValueError if it is another."""
    saved = read_checkpoint(path)
    fixed = set() if config.exact_negatives else {"micro_batch"}
    old, new = (Tokenizer(text).fingerprint for text in (saved["vocabulary"], clip.vocabulary))
    check_resume(saved["config"] | {"pairs": saved["data"], "words": old},
                 dataclasses.asdict(config) | {"pairs": data, "words": new}, MAY_CHANGE - fixed)
    clip.load_state_dict(saved["weights"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["bad"]


def start_from_vision(clip, path):
    """Put stage 1's vision tower into `clip`, every tensor of it; returns the line to print."""
    vision = load_vision(path)
    for field, ours in dataclasses.asdict(clip.config).items():
        theirs = getattr(vision.config, field)
        if theirs != ours and not field.startswith(("text_", "vocab_", "context_")):
            raise ValueError(f"init_vision={path}: its {field} is {theirs}, this run's {ours}")
    clip.vision.load_state_dict(vision.state_dict())
    return (f"vision tower from {path}: {len(vision.state_dict())} tensors, "
            f"checksum {weights_checksum(clip.vision.state_dict())}")


def main(argv=None):
    # ---- 1. settings and ranks
    config, _ = load_config(Config, globals(), argv, files=False)
    ranks, newest = Ranks(), os.path.join(config.out_dir, "ckpt.pt")
    local = ranks.share(config.batch_size)
    if not config.resume and os.path.exists(newest):
        raise ValueError(f"resume=False, but {newest} is there; choose another out_dir")
    stop, device = stop_on_signals(), ranks.start()

    # ---- 2. data; rank 0 builds the index, then the others find it
    tokenizer = Tokenizer(config.vocabulary)
    augmentation = None if config.overfit else Augmentation(
        config.crop, flip=config.flip, jitter=config.jitter, jitter_p=config.jitter_p,
        grey_p=config.grey_p, blur_p=config.blur_p, blur_sigma=config.blur_sigma)
    with ranks.first_alone():
        pairs = Pairs(config.data, tokenizer, config.image_size, config.seed, config.context_length,
                      augmentation, pick_caption, limit=config.overfit)
        held_out = HeldOut(config.held_out) if config.held_out else None
    total_steps = config.max_steps or config.epochs * (len(pairs) // config.batch_size)

    # ---- 3. model and optimizer; the seed fixes the text tower whatever the vision tower becomes
    torch.manual_seed(config.seed)
    clip = CLIP(dataclasses.replace(
        SIZES[config.model], image_size=config.image_size, context_length=config.context_length,
        vocab_size=tokenizer.size, quick_gelu=config.quick_gelu)).to(device)
    clip.vocabulary = tokenizer.text
    clip.vision.recompute = clip.text.recompute = config.recompute
    optimizer = torch.optim.AdamW(
        optimizer_groups(clip, config.weight_decay), lr=config.lr, eps=config.eps, fused=True,
        betas=(config.beta1, config.beta2))
    step, bad, source = 0, {}, "vision tower from random weights"
    if os.path.exists(newest):
        step, bad = load_run(newest, clip, optimizer, pairs.fingerprint, config)
        source = f"going on from {newest}, step {step}"
    elif config.init_vision:
        source = start_from_vision(clip, config.init_vision)
    order = PairBatches(len(pairs), config.batch_size, ranks.rank, ranks.world, step, total_steps)
    if config.compile:  # in place: names in the state dict stay clean; then DDP around it
        clip.vision.compile()
        clip.text.compile()
    model = clip if ranks.world == 1 else torch.nn.parallel.DistributedDataParallel(
        clip, gradient_as_bucket_view=True)
    make_views = torch.compile(augment) if config.compile else augment
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None

    # ---- 4. files and the first lines
    if ranks.rank == 0:
        write_record(config.out_dir, config, __file__)
    log = RunLog(config.out_dir, total_steps, step, config.log_to, mute=ranks.rank > 0)
    log.say(f"{len(pairs):,} pairs, {total_steps:,} steps of {config.batch_size:,} on "
            f"{ranks.world} x {device.type}; {source}")
    for group in optimizer.param_groups:
        log.say(f"weight decay {group['weight_decay']}: {len(group['names'])} tensors, "
                f"{sum(p.numel() for p in group['params']):,} parameters")

    # ---- 5. the loop; its state is step, the loader, bad_samples and bad_steps
    batches = load_batches(pairs, order, config.workers, pin_memory=device.type == "cuda")
    bad_samples, bad_steps = BadSamples(config.out_dir, bad), BadSteps(pairs)
    profiler = torch.profiler.profile(  # steps 3 to 7, for chrome://tracing or perfetto
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=5, repeat=1),
        on_trace_ready=lambda p: p.export_chrome_trace(f"{config.out_dir}/trace.json"))
    if config.profile:
        profiler.start()
    first_step, started, stopped = step, time.time(), False
    logged_step, logged, waited = step, started, 0.0
    while step < total_steps and not stopped:
        asked = time.time()
        batch = next(batches)
        waited += time.time() - asked
        images, draws = (batch[key].to(device, non_blocking=True) for key in ("images", "draws"))

        def embed_rows(rows):
            views = make_views(images[rows], draws[rows], augmentation)       # (micro, 3, S, S)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                return model(views, batch["tokens"][rows])

        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total_steps, config)
        loss, image_emb, text_emb = accumulate_gradient(model, embed_rows, local, config, ranks)
        grad_norm = torch.nn.utils.clip_grad_norm_(clip.parameters(), config.grad_clip or math.inf)
        # The fused kernel leaves weights and moments alone where found_inf is 1: no look, no wait.
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        clip.logit_scale.data.clamp_(max=math.log(100))  # the parameter, not the graph
        bad_steps.add(step, batch["samples"], image_emb + text_emb, grad_norm)
        bad_samples.add(batch["bad"])
        step += 1
        samples, last = step * config.batch_size, step == total_steps
        # Hosts agree on stopping and on bad samples; this does not wait for a GPU.
        stopped, bad_total = ranks.total(len(stop), bad_samples.total)
        bad_samples.check(bad_total, samples, ranks)

        # ---- 6. log, look, save
        if step % config.log_every == 0 or step == 1 or last or stopped:
            bad_steps.check(ranks, log.say)
            nearest = (image_emb[:1024] @ text_emb.T).argmax(1)                # of 1,024 suffice
            right = (nearest == torch.arange(len(nearest), device=device)).float().mean()
            loss, accuracy = ranks.mean(torch.stack([loss, right]))
            now = time.time()
            rate = (step - logged_step) * config.batch_size / (now - logged)
            log.write({
                "step": step, "samples": samples, "loss": loss, "accuracy": accuracy,
                "chance_loss": math.log(config.batch_size), "lr": optimizer.param_groups[0]["lr"],
                "scale": clip.logit_scale.exp().item(), "grad_norm": grad_norm.item(),
                "pairs_per_s": rate, "data_wait": waited / (now - logged), "utilisation": peak and
                rate * flops_per_pair(clip.config) / (peak * ranks.world)})
            logged_step, logged, waited = step, time.time(), 0.0
        if (held_out or config.benchmarks) and (
                last or config.eval_every and step % config.eval_every == 0):
            log.write(look(clip, tokenizer, held_out, step, config, ranks))
        crossed = any(0 <= samples - at < config.batch_size for at in config.keep_at)
        names = [f"samples_{samples:012d}.pt"] * crossed
        names += ["ckpt.pt"] * bool(last or stopped or step % config.save_every == 0)
        bad = bad_samples.counts(ranks) if names else bad
        for name in names if ranks.rank == 0 else ():
            save(name, clip, optimizer, step, bad, pairs.fingerprint, config)
        if config.profile:
            profiler.step()
    # ---- 7. the summary
    seconds, done = time.time() - started, (step - first_step) * config.batch_size
    memory = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(0).ru_maxrss
    log.say(f"step {step:,} of {total_steps:,}, {step * config.batch_size:,} samples; replaced: "
            f"{', '.join(f'{n} {why}' for why, n in bad.items()) or 'none'}; {clock(seconds)}, "
            f"{done / seconds:,.0f} pairs/s, peak memory {memory / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_main(main)
