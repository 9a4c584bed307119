"""Stage 2: contrastive language-image pretraining, from one CPU to many GPUs.

    python pretrain.py configs/toy.py
    python pretrain.py configs/toy.py configs/ideas/siglip.py        # a recipe over a recipe
    torchrun --nproc_per_node=8 pretrain.py configs/yfcc.py

In: tar shards of image-caption pairs, a vocabulary and, for perceptual initialization, the
vision tower of stage 1 (init_vision). Out, in out_dir: ckpt.pt (newest), samples_*.pt
(milestones), log.jsonl, bad_samples.tsv, record/. The same command goes on where it stopped.
Letters as in model.py; B is the global batch, b this rank's share of it.
"""
import dataclasses
import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor

from configs import (check_patches, check_ranges, given,  # before torch: see there
                     load_config, replaced_functions)
import torch
import torch.nn.functional as F
from torch import nn

from data.images import Augmentation, Pixels, augment_batch
from data.log import (Meter, RunLog, check_resume, in_words, run_main, stop_on_signals,
                      write_record)
from data.pairs import (BadSamples, BadSteps, HeldOut, PairBatches, Pairs, join_parts,
                        load_batches, loader_line, split_rows)
from data.pieces import ChunkedLoss, cached_gradient
from data.ranks import Ranks, need_compiler
from data.shards import Shards, index_shards
from data.text import Tokenizer
from evaluate import embed, embed_texts, embed_triplets, evaluate_set, retrieve, two_afc
from model import (CLIP, FORMAT, SIZES, copy_weights, flops_per_pair,
                   host_copy, optimizer_groups, peak_flops, read_checkpoint, write_checkpoint)

# What a recipe may replace; the functions stand below in this order, with their defaults.
HOOKS = ("choose_pairs", "pick_caption", "extra_arrays", "augment", "prepare_model", "encode",
         "global_loss", "lr_at", "after_step")
# What may differ when a run goes on: it does not change what is learnt. The paths of data and
# vocabulary may change; their content may not. The last two are settings of earlier versions.
MAY_CHANGE = {"data", "held_out", "vocabulary", "benchmarks", "judgements", "out_dir",
              "workers", "micro_batch", "compile", "loss_chunk", "recompute", "log_every",
              "log_to", "eval_every", "save_every", "keep_at", "resume", "change",
              "keep_last", "profile"}


@dataclasses.dataclass
class Config:
    # data
    data: str = "data/yfcc15m"            # folder of tar shards (data/shards.py)
    held_out: str = ""                    # pairs never trained on, for loss and recall
    vocabulary: str = "data/clip.tiktoken"
    benchmarks: str = ""                  # zero-shot sets to watch; they select nothing
    judgements: str = ""                  # sets of judgements to watch, as evaluate.py has them
    out_dir: str = "out/yfcc"
    workers: int = -1                     # loader processes of each rank; 0 loads in the loop,
                                          # -1: the machine's cores / its ranks, less 1
    # model
    model: str = "ViT-B-32"               # a key of model.SIZES
    image_size: int = 224                 # pixels
    context_length: int = 77              # tokens
    quick_gelu: bool = False              # OpenAI's activation; GELU otherwise
    init_vision: str = ""                 # tower of perceptual_init.py; "": random weights
    init: str = ""                        # a whole CLIP to start from
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
    micro_batch: int = 0                  # pairs in memory at once on a rank; 0: all its own
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
    recompute: bool = False               # activation checkpointing: a third more time
    # log and files
    log_every: int = 50                   # steps; the only steps at which the host waits
    log_to: str = ""                      # also to "tensorboard" or "wandb"
    eval_every: int = 0                   # steps between looks at unseen sets; 0: at the end
    save_every: int = 1000                # steps
    keep_at: tuple = ()                   # milestones kept, in samples seen, for scaling curves
    resume: bool = True                   # False: insist on an out_dir without a checkpoint
    change: str = ""                      # settings that may differ on resuming, "lr,dtype"

    def check(self):
        check_ranges(
            self, model=tuple(SIZES), decay=("cosine", "constant"),
            dtype=("bfloat16", "float32"), log_to=("", "tensorboard", "wandb"),
            positive=("image_size", "context_length", "batch_size", "epochs", "lr", "eps",
                      "log_every", "save_every"),
            not_negative=("micro_batch", "loss_chunk", "max_steps", "min_lr", "warmup_steps",
                          "weight_decay", "grad_clip", "eval_every", "seed"))
        check_patches(self, SIZES[self.model].patch_size)
        if self.init and self.init_vision:
            raise ValueError(f"init={self.init}: brings its vision tower; drop init_vision")
        if self.compile:
            need_compiler()
        newest = os.path.join(self.out_dir, "ckpt.pt")
        if not self.resume and os.path.exists(newest):
            raise ValueError(f"resume=False, but {newest} is there; choose another out_dir")


# ---------------------------------------- functions that a recipe may replace (HOOKS above)
# Rules that keep micro-batches, ranks and resuming exact: encode() draws nothing at random. What
# one pair decides alone is a row of encode(); what needs others lies in global_loss(), which uses
# every row. All state is in the state dict.

def choose_pairs(shards, config):
    """Numbers of the pairs to train on, a sequence; shards: data.shards.Shards."""
    return range(len(shards))


def pick_caption(count, rng):
    """Index of the caption to use among an image's `count`; rng is the sample's generator."""
    return int(rng.integers(count))


def extra_arrays(pairs, sample, caption, rng, config):
    """{name: array} that the batch holds beside image and tokens, made by the loader.

    pairs: data.pairs.Pairs; sample: number of the pair; caption: the index picked; rng: its
    own generator, behind all other draws. int64 arrays are token ids and stay on the host.
    """
    return {}


def augment(images, draws, augmentation):
    """uint8 (b, 3, S, S), drawn parameters (b, 11) -> float32 normalised, on the device."""
    return augment_batch(images, draws, augmentation)


def prepare_model(clip, config):
    """Freeze, exchange or add parts before the optimizer exists; a checkpoint then fills them.

    What only training needs hangs on clip.extra: it is saved, and load_clip leaves it out.
    """


def encode(clip, batch, config):
    """A batch -> {name: rows (b, ...) or a scalar ()}, all that global_loss needs.

    batch: views (b, 3, S, S) normalised, tokens (b, L) on the host, and what extra_arrays made.
    """
    image, text, scale = (clip.encode_image(batch["views"]), clip.encode_text(batch["tokens"]),
                          clip.logit_scale.exp())
    return {"image": image, "text": text, "scale": scale}             # (b, E), (b, E), ()


def global_loss(rows, config, ranks):
    """The loss of this rank's rows among those of all ranks, a mean over its own rows.

    DDP averages the ranks' gradients, so together they are the gradient of the mean over all B
    rows: no further factor is due.
    """
    all_image, all_text = ranks.gather(rows["image"], rows["text"])   # (B, E) each
    first_row = ranks.rank * len(rows["image"])
    inputs = rows["image"], rows["text"], all_image, all_text, rows["scale"], first_row
    if config.loss_chunk:
        return ChunkedLoss.apply(contrastive_loss, config.loss_chunk, *inputs)
    return contrastive_loss(*inputs)


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


def after_step(clip, step, total_steps, config):
    """After each update: caps the temperature as CLIP does. The parameter, not the graph."""
    clip.logit_scale.data.clamp_(max=math.log(100))


# ------------------------------------------------------------------------------------- the loss

def contrastive_loss(image_emb, text_emb, all_image_emb, all_text_emb, scale, first_row):
    """Symmetric InfoNCE of this rank's rows against every pair (arXiv 2103.00020, fig. 3).

    image_emb, text_emb: (b, E) unit rows of this rank, which stand at first_row of the (B, E)
    all_*; scale (): exp of the learned temperature. Returns the mean over rows, both ways.
    """
    labels = first_row + torch.arange(len(image_emb), device=image_emb.device)     # (b,)
    image_loss = F.cross_entropy(scale * image_emb @ all_text_emb.T, labels)
    text_loss = F.cross_entropy(scale * text_emb @ all_image_emb.T, labels)
    return (image_loss + text_loss) / 2


class Encoder(nn.Module):
    """encode() as a module's forward: what DDP wraps."""

    def __init__(self, clip, config):
        super().__init__()
        self.clip, self.config = clip, config

    def forward(self, batch):
        device_type = self.clip.logit_scale.device.type
        with torch.autocast(device_type, torch.bfloat16, self.config.dtype == "bfloat16"):
            return encode(self.clip, batch, self.config)


def whole_gradient(model, batch, config, ranks):
    """Leave in .grad the gradient of the loss over the global batch; returns loss and rows."""
    rows = model(batch)
    loss = global_loss(rows, config, ranks)
    loss.backward()
    return loss.detach(), {name: row.detach() for name, row in rows.items()}


# ------------------------------------------------------------------ starting, looking, saving

def build(config, tokenizer):
    """A CLIP of the run's size, its AdamW, and a word on where its weights come from."""
    torch.manual_seed(config.seed)  # fixes the text tower whatever the vision tower becomes
    clip = CLIP(dataclasses.replace(
        SIZES[config.model], image_size=config.image_size, context_length=config.context_length,
        vocab_size=tokenizer.size, quick_gelu=config.quick_gelu))
    clip.vocabulary = tokenizer.text
    clip.vision.recompute = clip.text.recompute = config.recompute
    source = "random weights"
    said = config.quick_gelu or given("quick_gelu", None)  # the default says nothing of a file
    if config.init:
        source = copy_weights(config.init, clip, said)
    elif config.init_vision:
        source = copy_weights(config.init_vision, clip.vision, said)
    prepare_model(clip, config)
    clip.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(
        optimizer_groups(clip, config.weight_decay), lr=config.lr, eps=config.eps, fused=True,
        betas=(config.beta1, config.beta2))
    return clip, optimizer, source


def load_run(path, clip, optimizer, data, config):
    """Put the run saved at `path` back; returns (step, bad counts, {setting: (old, new)})."""
    saved = read_checkpoint(path)
    if saved["kind"] != "clip" or saved["optimizer"] is None:
        raise ValueError(f"{path}: a tower of stage 1, or a milestone, from which no run can go "
                         "on; choose another out_dir")
    if not saved["config"].pop("exact_negatives", True):  # settings of earlier versions
        saved["hooks"] = {"global_loss": "configs.ideas.alone"}
    if saved["config"].get("overfit") == 0:
        del saved["config"]["overfit"]
    old, new = (Tokenizer(text).fingerprint for text in (saved["vocabulary"], clip.vocabulary))
    before = {"pairs": saved["data"], "words": old, "hooks": saved.get("hooks", {})}
    now = {"pairs": data, "words": new, "hooks": replaced_functions()}
    before, now = before | saved["config"], now | dataclasses.asdict(config)
    changed = check_resume(before, now, MAY_CHANGE, config.change)
    clip.load_state_dict(saved["weights"])
    moments = {"state": saved["optimizer"]["state"]}  # decay, betas and eps are this run's
    optimizer.load_state_dict(optimizer.state_dict() | moments)
    return saved["step"], saved["bad"], changed


@torch.no_grad()
def look(clip, tokenizer, held_out, sets, judged, step, config, ranks):
    """A log record of held-out, zero-shot and judgement figures; the ranks share the work."""
    figures = {"step": step, "samples": step * config.batch_size}
    how = {"device": clip.logit_scale.device, "dtype": config.dtype, "ranks": ranks}
    clip.eval()
    with torch.compiler.set_stance("force_eager"):  # odd batch sizes are not worth compiling
        if held_out:
            pixels = Pixels(held_out, config.image_size)
            image = embed(clip.encode_image, pixels, batch_size=256, **how)        # (n, E)
            text = embed_texts(clip, tokenizer, held_out.captions, {}, **how)      # (n, E)
            scale = clip.logit_scale.exp().cpu()
            figures["val_loss"] = ChunkedLoss.apply(
                contrastive_loss, 1024, image, text, image, text, scale, 0).item()
            recalls, _ = retrieve(image, text, torch.arange(len(image)))
            figures |= {f"val_{name}": value for name, value in recalls.items()}
        for name, benchmark in sets.items():
            tasks = evaluate_set(clip, tokenizer, benchmark, dtype=config.dtype, ranks=ranks)
            figures[f"zero_shot/{name}"] = tasks[name]["metrics"][tasks[name]["main"]]
        for name, triplets in judged.items():
            sides = embed_triplets(clip.encode_image, triplets, config.image_size, **how)
            labels = torch.from_numpy(triplets.labels)                             # (n,)
            figures[f"2afc/{name}"] = two_afc(*sides, labels).mean().item()
    clip.train()
    return figures


def step_figures(loss, rows, tokens, clip, config, ranks):
    """Figures of a step, means over ranks, and its FLOP a pair; waits for the device."""
    nearest = (rows["image"][:1024] @ rows["text"].T).argmax(1)            # 1,024 suffice
    right = (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean()
    loss, accuracy = ranks.mean(torch.stack([loss, right]))
    length = tokens.argmax(1).float().mean().item() + 1                    # up to the end token
    return {"loss": loss, "accuracy": accuracy, "chance_loss": math.log(config.batch_size),
            "scale": clip.logit_scale.exp().item()}, flops_per_pair(clip.config, length)


def save(names, config, content):
    """Write out_dir/name; milestones without optimizer state. A full disk is a warning."""
    for name in names:
        path = os.path.join(config.out_dir, name)
        whole = content if name == "ckpt.pt" else content | {"optimizer": None}
        try:
            write_checkpoint(path, whole)
        except OSError as error:
            print(f"warning: {path} not written ({error}); the last one stays, the run goes on")


def main(argv=None):
    # ---- 1. settings and ranks
    config, _ = load_config(Config, globals(), argv, files=0)
    augmentation = Augmentation(config.crop, flip=config.flip, jitter=config.jitter,
                                jitter_p=config.jitter_p, grey_p=config.grey_p,
                                blur_p=config.blur_p, blur_sigma=config.blur_sigma)
    ranks, newest = Ranks(), os.path.join(config.out_dir, "ckpt.pt")
    b = ranks.share(config.batch_size)
    micro = config.micro_batch or b
    device = ranks.start()
    resumes = ranks.agree(os.path.exists(newest), f"whether {newest} is there")

    # ---- 2. data; rank 0 builds the index, then the others find it
    tokenizer = Tokenizer(config.vocabulary)
    with ranks.first_alone():
        index_shards(config.data, tokenizer)
        held_out = HeldOut(config.held_out) if config.held_out else None
    sets, judged = {}, {}
    if config.benchmarks:
        from data.benchmarks import open_sets  # here, for those who watch them only
        sets = open_sets(config.benchmarks, partial=True)
    if config.judgements:
        from data.judgements import open_judgements
        judged = open_judgements(config.judgements, min_votes=6)
    shards = Shards(config.data, tokenizer)
    pairs = Pairs(shards, tokenizer, config, augmentation, pick_caption, extra_arrays,
                  choose_pairs(shards, config))
    total_steps = config.max_steps or config.epochs * (len(pairs) // config.batch_size)

    # ---- 3. model and optimizer
    clip, optimizer, source = build(config, tokenizer)
    step, bad, changed = 0, {}, {}
    if resumes:
        step, bad, changed = load_run(newest, clip, optimizer, pairs.fingerprint, config)
        source = f"{newest}, step {step}"
    order = PairBatches(len(pairs), config.batch_size, ranks.rank, ranks.world, step,
                        total_steps)
    batches = load_batches(pairs, order, config.workers, pin_memory=device.type == "cuda")
    if config.compile:  # in place: names in the state dict stay clean; then DDP around it
        clip.vision.compile()
        clip.text.compile()
    model = Encoder(clip, config)
    if ranks.world > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    make_views = torch.compile(augment) if config.compile else augment
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None

    # ---- 4. files and the first lines
    changes = in_words(changed)
    if ranks.rank == 0:
        write_record(config.out_dir, config, __file__, f"  # from step {step}{changes}")
    log = RunLog(config.out_dir, total_steps, step, config.log_to, mute=ranks.rank > 0)
    log.say(f"{len(pairs):,} pairs, {total_steps:,} steps of {config.batch_size:,} on "
            f"{ranks.world} x {device.type}, from {source}{changes}")
    usual = flops_per_pair(clip.config, text_tokens=17)  # a usual caption's
    log.say(loader_line(pairs, order, config.workers, peak and 0.3 * peak / usual))
    if changed:
        log.write({"step": step, "samples": step * config.batch_size, "changed": changed})
    for group in optimizer.param_groups:
        log.say(f"weight decay {group['weight_decay']}: {len(group['names'])} tensors, "
                f"{sum(p.numel() for p in group['params']):,} parameters")

    # ---- 5. the loop; its state is step, the loader, bad_samples and bad_steps
    bad_samples, bad_steps = BadSamples(config.out_dir, bad), BadSteps(pairs)
    writer, saving, stop, stopped = ThreadPoolExecutor(1), None, [], False
    meter, first_step = Meter(step), step
    while step < total_steps and not stopped:
        with meter.waiting():
            batch = join_parts(next(batches), device)
        parts = split_rows(batch, micro)
        for part in parts:
            part["views"] = make_views(part["images"], part["draws"], augmentation)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total_steps, config)
        if len(parts) == 1:
            loss, rows = whole_gradient(model, parts[0], config, ranks)
        else:
            loss_of = functools.partial(global_loss, config=config, ranks=ranks)
            loss, rows = cached_gradient(model, parts, loss_of, ranks)
        grad_norm = nn.utils.clip_grad_norm_(clip.parameters(), config.grad_clip or math.inf)
        # The fused kernel leaves weights and moments alone where found_inf is 1: no wait.
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        optimizer.step()
        optimizer.zero_grad()
        after_step(clip, step, total_steps, config)
        bad_steps.add(step, batch["samples"], rows["image"] + rows["text"], grad_norm)
        bad_samples.add(batch["bad"])
        step += 1
        if step == first_step + 1:  # until now Ctrl-C ended at once, also while compiling
            stop = stop_on_signals()
        samples, last = step * config.batch_size, step == total_steps
        # Hosts agree on stopping and on bad samples; this does not wait for a GPU.
        stopped, bad_total = ranks.total(len(stop), bad_samples.total)
        bad_samples.check(bad_total, samples, ranks)

        # ---- 6. log, look, save
        if step % config.log_every == 0 or step == 1 or last or stopped:
            bad_steps.check(ranks, log.say)
            figures, flops = step_figures(loss, rows, batch["tokens"], clip, config, ranks)
            rate, waited = meter.read(step)
            log.write({
                "step": step, "samples": samples, **figures, "grad_norm": grad_norm.item(),
                "lr": optimizer.param_groups[0]["lr"], "pairs_per_s": rate * config.batch_size,
                "data_wait": waited, "utilisation": peak and
                rate * config.batch_size * flops / (peak * ranks.world)})
        looks = last or config.eval_every and step % config.eval_every == 0
        if looks and (held_out or sets or judged):
            log.write(look(clip, tokenizer, held_out, sets, judged, step, config, ranks))
        names = []
        if any(0 <= samples - at < config.batch_size for at in config.keep_at):
            names.append(f"samples_{samples:012d}.pt")
        if last or stopped or step % config.save_every == 0:
            names.append("ckpt.pt")
        if names:
            bad = bad_samples.counts(ranks)
        if names and ranks.rank == 0:  # copied now, written beside the next steps
            if saving:
                saving.result()
            saving = writer.submit(save, names, config, host_copy({
                "format": FORMAT, "kind": "clip", "data": pairs.fingerprint, "bad": bad,
                "step": step, "samples": samples, "model": dataclasses.asdict(clip.config),
                "weights": clip.state_dict(), "config": dataclasses.asdict(config),
                "hooks": replaced_functions(), "optimizer": optimizer.state_dict(),
                "vocabulary": clip.vocabulary}))
    writer.shutdown()

    # ---- 7. the summary
    replaced = ", ".join(f"{count} {reason}" for reason, count in bad.items()) or "none"
    ends = "stopped, the same command goes on; " if step < total_steps else ""
    log.summary(step, step * config.batch_size, f"{ends}replaced: {replaced}")


if __name__ == "__main__":
    run_main(main)
