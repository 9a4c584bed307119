"""Stage 1: human similarity judgements -> the vision tower that pretraining starts from.

    python perceptual_init.py configs/nights.py          # -> a tower for pretrain's init_vision
    python perceptual_init.py configs/nights_posthoc.py  # the control: judgements afterwards

In: triplets (data/triplets.py). The post-hoc control also needs `init`, a whole CLIP: its vision
tower is fine-tuned, its text tower stays bit for bit as it was, and all of it is saved.
Out, in out_dir: ckpt.pt (the last), best.pt (lowest validation loss), log.jsonl, record/.
The same command resumes a run. One device is enough. Paper: arXiv 2505.14204.
B triplets of a batch, b of a micro-batch, n of a split; S image side; E width of an embedding.
"""
import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from configs import (check_patches, check_ranges, load_config,  # before torch: see there
                     replaced_functions)
import torch
import torch.nn.functional as F

from data.images import normalise
from data.log import (Meter, RunLog, check_resume, in_words, run_main, stop_on_signals,
                      write_record)
from data.ranks import need_compiler
from data.text import Tokenizer
from data.triplets import Triplets
from evaluate import embed_triplets, evaluate_set, two_afc
from model import (FORMAT, SIZES, VisionTower, load_clip, optimizer_groups,
                   read_checkpoint, weights_checksum, write_checkpoint)

HOOKS = ("triplet_loss", "lr_at", "augment", "batch_loss")  # what a recipe may replace


@dataclass
class Config:
    data: str = "data/nights"     # NIGHTS folder (with data.csv), or a CSV ref,left,right,label
    min_votes: int = 6            # unanimous judgements a triplet needs, in every split
    fraction: float = 1.0         # share of the training triplets; 5 % is contained in 10 %
    shuffle_votes: bool = False   # control: permute the votes among the training triplets
    out_dir: str = "out/nights"
    model: str = "ViT-B-32"       # a key of model.SIZES
    image_size: int = 224         # pixels; both sides are squashed to it
    init: str = ""                # post-hoc control: a CLIP to fine-tune; "": a random tower
    quick_gelu: bool | None = None  # activation of an init that does not tell it
    train: str = "all"            # or "qkv": only weights and biases of the attention inputs
    benchmarks: str = ""          # post-hoc: zero-shot sets for the log, before and after
    batch_size: int = 768         # triplets of a step
    micro_batch: int = 0          # triplets in memory at once, 0: all; the gradient is the same
    epochs: int = 32
    max_steps: int = 0            # 0: by epochs
    warmup_steps: int = 150
    lr: float = 5e-4              # peak
    min_lr: float = 0.0           # of the last step
    decay: str = "cosine"         # over this run's own steps, or "constant"
    weight_decay: float = 0.1     # of AdamW, which is Adam at 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    grad_clip: float = 3.0        # norm of the whole gradient; 0: no clipping
    margin: float = 0.05          # of the hinge, in cosine distance
    seed: int = 42
    dtype: str = "bfloat16"       # of autocast; "float32" for none
    compile: bool = True          # torch.compile the tower
    log_every: int = 10           # steps
    save_every: int = 100         # steps
    resume: bool = True           # False: insist on an empty out_dir
    change: str = ""              # settings that may differ on resuming, "lr,dtype"

    def check(self):
        check_ranges(
            self, model=tuple(SIZES), train=("all", "qkv"), decay=("cosine", "constant"),
            dtype=("bfloat16", "float32"),
            positive=("image_size", "batch_size", "epochs", "lr", "eps", "log_every",
                      "save_every"),
            not_negative=("min_votes", "micro_batch", "max_steps", "warmup_steps", "min_lr",
                          "weight_decay", "beta1", "beta2", "grad_clip", "margin", "seed"))
        check_patches(self, SIZES[self.model].patch_size)
        if self.benchmarks and not self.init:
            raise ValueError(f"benchmarks={self.benchmarks}: zero-shot needs a CLIP; set init")


# -------------------------------------------------------- functions that a recipe may replace

def triplet_loss(ref, left, right, labels, margin):
    """Hinge on the lead of the chosen side, a mean over triplets (arXiv 2505.14204).

    ref, left, right: (b,E) unit float32; labels (b,), 1 = right chosen. Returns a scalar.
    """
    d_left = 1 - (ref * left).sum(-1)                                        # (b,)
    d_right = 1 - (ref * right).sum(-1)                                      # (b,)
    y = 2 * labels - 1                                                       # (b,) +-1
    return F.relu(margin - y * (d_left - d_right)).mean()


def lr_at(step, total_steps, config):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine down to min_lr."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps * config.lr
    if config.decay == "constant":
        return config.lr
    done = (step + 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * ((1 + math.cos(math.pi * done)) / 2)


def augment(images, samples, epoch, seed):
    """uint8 (3b,3,S,S) -> normalised float32; samples (3b,) key draws (configs/things.py)."""
    return normalise(images)


def batch_loss(tower, samples, images, labels, epoch, config):
    """Mean loss and mean 2AFC of b triplets, two scalars.

    samples (b,3) int64, images (b,3,3,S,S) uint8, labels (b,), as Triplets.batch has them.
    """
    pixels = augment(images.flatten(0, 1), samples.flatten(), epoch, config.seed)  # (3b,3,S,S)
    bfloat16 = config.dtype == "bfloat16"
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bfloat16):
        embeddings = tower(pixels)                                           # (3b,E)
    embeddings = F.normalize(embeddings.float(), dim=-1)
    ref, left, right = embeddings.unflatten(0, (-1, 3)).unbind(1)            # (b,E) each
    loss = triplet_loss(ref, left, right, labels, config.margin)
    return loss, two_afc(ref, left, right, labels).mean()


def build(config, device):
    """(what is saved, its vision tower); only what is trained requires gradients."""
    torch.manual_seed(config.seed)
    size = replace(SIZES[config.model], image_size=config.image_size)
    if config.init:
        whole = load_clip(config.init, quick_gelu=config.quick_gelu)
        if config.benchmarks and whole.vocabulary is None:
            raise ValueError(f"benchmarks: the CLIP of init={config.init} has no vocabulary")
        tower = whole.vision
        for field in ("image_size", "patch_size", "vision_width", "vision_layers", "embed_dim"):
            here = getattr(size, field)
            if getattr(whole.config, field) != here:
                raise ValueError(f"init={config.init}: its {field} is not {here} as here")
    else:
        whole = tower = VisionTower(size)
    whole.requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(config.train == "all" or ".qkv." in name)
    return whole.to(device), tower


# -------------------------------------------------------------------------- parts of the loop

def accumulate(tower, batch, epoch, config, device):
    """Leave the gradient of the batch's mean loss in .grad; return its loss and mean 2AFC."""
    samples, images, labels = batch                                # (B,3), (B,3,3,S,S), (B,)
    micro_batch = config.micro_batch or config.batch_size
    total = torch.zeros(2, device=device)
    for start in range(0, config.batch_size, micro_batch):
        part = slice(start, start + micro_batch)
        loss, score = batch_loss(tower, samples[part], images[part].to(device),
                                 labels[part].to(device), epoch, config)
        share = len(labels[part]) / config.batch_size  # a sum of shares is the batch's mean
        (share * loss).backward()
        total += share * torch.stack([loss.detach(), score.detach()])
    return total.tolist()  # waits for the device; steps of 0.1 s do not notice


def look(whole, tower, splits, sets, config, device):
    """Loss and 2AFC of splits, main metrics of the zero-shot `sets`; in float32."""
    figures = {}
    for triplets in splits:
        ref, left, right = embed_triplets(tower.forward, triplets, config.image_size, device)
        labels = torch.from_numpy(triplets.labels)                           # (n,)
        loss = triplet_loss(ref, left, right, labels, config.margin)
        figures[f"{triplets.split}_loss"] = loss.item()
        figures[f"{triplets.split}_2afc"] = two_afc(ref, left, right, labels).mean().item()
    if sets:
        tokenizer = Tokenizer(whole.vocabulary)
        for name, benchmark in sets.items():
            task = evaluate_set(whole, tokenizer, benchmark)[name]
            figures[f"zero_shot/{name}"] = task["metrics"][task["main"]]
    return figures


def save(path, whole, optimizer, state, config):
    """Write a checkpoint. A full disk is a warning: the last good file stays."""
    content = {"format": FORMAT, "kind": "vision", "model": asdict(whole.config),
               "weights": whole.state_dict(), "optimizer": optimizer.state_dict(),
               "samples": state["step"] * config.batch_size, "vocabulary": None,
               "config": asdict(config), "hooks": replaced_functions()}
    if config.init:  # a CLIP's samples are the pairs that it has seen, as before
        content["kind"] = "clip"
        content["samples"] = whole.info["samples"]
        content["vocabulary"] = whole.vocabulary
    content.update(state)
    try:
        write_checkpoint(path, content)
    except OSError as error:
        print(f"warning: {path} not written ({error}); the run goes on")


def load_run(path, whole, optimizer, state, config):
    """Put the run saved at `path` back; returns its state, and {setting: (old, new)}."""
    saved, hooks = read_checkpoint(path), replaced_functions()
    before = {"triplets": saved["data"], "hooks": saved.get("hooks", hooks)}
    changed = check_resume(saved["config"] | before,
                           asdict(config) | {"triplets": state["data"], "hooks": hooks},
                           may_change=("data", "out_dir", "benchmarks", "micro_batch", "compile",
                                       "log_every", "save_every", "resume", "change"),
                           change=config.change)
    whole.load_state_dict(saved["weights"])
    moments = {"state": saved["optimizer"]["state"]}  # decay, betas and eps are this run's
    optimizer.load_state_dict(optimizer.state_dict() | moments)
    return {key: saved[key] for key in state}, changed


def main(argv=None):
    # ---- 1. settings
    config, _ = load_config(Config, globals(), argv, files=0)
    out = pathlib.Path(config.out_dir)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("perceptual_init.py trains on one device; start it without torchrun")
    if not config.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"resume=False: {out} is not empty; choose another out_dir")
    if config.compile:
        need_compiler()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # ---- 2. triplets
    train = Triplets(config.data, "train", config.min_votes, config.fraction,
                     config.shuffle_votes, config.seed)
    val = Triplets(config.data, "val", config.min_votes)
    test = Triplets(config.data, "test", config.min_votes)
    steps_per_epoch = len(train) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"batch_size={config.batch_size}: only {len(train)} training triplets")
    total_steps = config.max_steps or config.epochs * steps_per_epoch

    # ---- 3. tower and optimizer; then the state of a run that stopped
    whole, tower = build(config, device)
    sets = {}
    if config.benchmarks:
        from data.benchmarks import open_sets  # here, for those who watch them only
        sets = open_sets(config.benchmarks, partial=True)
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        optimizer_groups(tower, config.weight_decay), lr=config.lr, eps=config.eps, fused=True,
        betas=(config.beta1, config.beta2))
    state = {"step": 0, "best_loss": math.inf, "before": None,
             "data": f"{train.fingerprint}-{val.fingerprint}-{test.fingerprint}"}
    changed = {}
    if (out / "ckpt.pt").exists():
        state, changed = load_run(out / "ckpt.pt", whole, optimizer, state, config)
    for triplets in (train, val, test):  # every image is decoded once, before the first step
        triplets.keep(config.image_size)

    # ---- 4. the first lines, and what the tower knows before training
    write_record(out, config, __file__, f"  # from step {state['step']}{in_words(changed)}")
    log = RunLog(out, total_steps, state["step"])
    numbers = sum(parameter.numel() for parameter in trained)
    log.say(f"{len(train):,} triplets for {numbers:,} parameters; at step {state['step']} on "
            f"{device}, checksum {weights_checksum(tower.state_dict())}")
    if state["before"] is None:
        state["before"] = look(whole, tower, (val, test), sets, config, device)
        log.write({"step": 0, "samples": 0} | state["before"])
    if config.compile:  # in place: names in the checkpoint stay clean
        tower.compile()

    # ---- 5. the loop; its state is `state`, weights and moments
    stop, stopped = stop_on_signals(), False
    meter, bad_steps, record = Meter(state["step"]), 0, {}  # bad steps in a row; last figures
    loader = ThreadPoolExecutor(1)  # gathers the next batch while this one trains
    upcoming = loader.submit(train.batch, state["step"], config)
    while state["step"] < total_steps and not stopped:
        step = state["step"]
        with meter.waiting():
            batch = upcoming.result()
        upcoming = loader.submit(train.batch, step + 1, config)
        rate = lr_at(step, total_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, score = accumulate(tower, batch, step // steps_per_epoch, config, device)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf).item()
        if math.isfinite(norm):
            optimizer.step()
            bad_steps = 0
        else:  # images are bytes: the step size, or a recipe's loss, is to blame
            bad_steps += 1
            rows = batch[0][:8, 0] // 3
            log.say(f"step {step + 1} skipped: loss {loss}, gradient norm {norm}, triplets of "
                    + ", ".join(train.paths[rows, 0]))
        if bad_steps == 5:
            raise ValueError("five steps in a row without a finite gradient; go on from the last "
                             "checkpoint with a lower lr (--lr=... --change=lr)")
        optimizer.zero_grad()
        step += 1
        state["step"] = step
        last, stopped = step == total_steps, bool(stop)

        # ---- 6. log, look, save
        record = {}
        if last or step % config.log_every == 0:
            speed, waited = meter.read(step)
            record |= {"loss": loss, "2afc": score, "lr": rate, "grad_norm": norm,
                       "data_wait": waited, "triplets_per_s": speed * config.batch_size}
        if last:
            record |= look(whole, tower, (val, test), sets, config, device)
        elif step % steps_per_epoch == 0:
            record |= look(whole, tower, (val,), {}, config, device)
        if "val_loss" in record and record["val_loss"] < state["best_loss"]:
            state["best_loss"] = record["val_loss"]
            save(out / "best.pt", whole, optimizer, state, config)
        if record:
            log.write({"step": step, "samples": step * config.batch_size} | record)
        if last or stopped or step % config.save_every == 0:
            save(out / "ckpt.pt", whole, optimizer, state, config)

    # ---- 7. the summary
    gained = [f"{name} {before:.3f} -> {record[name]:.3f}"
              for name, before in state["before"].items() if name in record]
    said = ", ".join(gained) or ("stopped" if stopped else "was complete")
    log.summary(state["step"], state["step"] * config.batch_size, said)


if __name__ == "__main__":
    run_main(main)
