"""Stage 1: human similarity judgements -> the vision tower that pretraining starts from.

    python perceptual_init.py configs/nights.py            # -> out/nights/ckpt.pt, for init_vision
    python perceptual_init.py configs/nights_posthoc.py    # the control: judgements come afterwards

In: triplets (data/triplets.py); for the post-hoc control also `init`, a CLIP whose vision tower is
fine-tuned and which is saved whole, its text tower bit for bit as it was. Out, in out_dir: ckpt.pt
(the last), best.pt (lowest validation loss), log.jsonl, record/. The same command resumes it. One
device is enough. Paper: arXiv 2505.14204. b triplets of a micro-batch, n of a split.
"""
import math
import os
import pathlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

from configs import load_config  # before torch: see there
import torch
import torch.nn.functional as F

from data.benchmarks import find_sets
from data.images import normalise
from data.log import RunLog, check_resume, run_main, write_record
from data.text import Tokenizer
from data.triplets import Triplets
from evaluate import embed_triplets, evaluate_set, two_afc
from model import (FORMAT, SIZES, VisionTower, load_clip, optimizer_groups, read_checkpoint,
                   weights_checksum, write_checkpoint)


@dataclass
class Config:
    data: str = "data/nights"     # NIGHTS folder (with data.csv), or a CSV ref,left,right,label
    min_votes: int = 6            # unanimous judgements a triplet needs, in every split
    fraction: float = 1.0         # share of the training triplets; 5 % is contained in 10 %
    shuffle_votes: bool = False   # control: permute the votes among the training triplets
    out_dir: str = "out/nights"
    model: str = "ViT-B-32"       # a key of model.SIZES
    image_size: int = 224         # pixels; both sides are squashed to it
    init: str = ""                # post-hoc control: a CLIP to fine-tune; "": random vision tower
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

    def check(self):
        words = {"model": tuple(SIZES), "train": ("all", "qkv"), "decay": ("cosine", "constant"),
                 "dtype": ("bfloat16", "float32")}
        above_0 = ("image_size", "batch_size", "epochs", "log_every", "save_every", "lr", "eps")
        for key, value in asdict(self).items():
            if value not in words.get(key, [value]):
                raise ValueError(f"{key}={value!r}: must be one of {', '.join(words[key])}")
            if not isinstance(value, str) and (value < 0 or value == 0 and key in above_0):
                raise ValueError(f"{key}={value}: must be above 0{' or 0' * (key not in above_0)}")


# ----------------------------------------------------------- functions that a recipe may replace


def triplet_loss(ref, left, right, labels, margin):
    """Hinge on the lead of the chosen side, a mean over triplets (arXiv 2505.14204).

    ref, left, right: (b,E) unit float32; labels (b,), 1 = right chosen; d = 1 - cos.
    """
    d_left, d_right = (1 - (ref * side).sum(-1) for side in (left, right))   # (b,) each
    y = 2 * labels - 1                                                       # (b,) +-1
    return F.relu(margin - y * (d_left - d_right)).mean()


def lr_at(step, total_steps, config):
    """Learning rate of update `step` (from 0): linear warm-up, then a cosine down to min_lr."""
    warm = min(1, (step + 1) / max(1, config.warmup_steps))
    done = max(0, step + 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    fall = 1 if config.decay == "constant" else (1 + math.cos(math.pi * done)) / 2
    return warm * (config.min_lr + (config.lr - config.min_lr) * fall)


def augment(images, samples, epoch, seed):
    """uint8 (3b,3,S,S) -> normalised float32; samples (3b,) key draws, as in configs/things.py."""
    return normalise(images)


def build(config, device):
    """(what is saved, its vision tower); only what is trained requires gradients."""
    torch.manual_seed(config.seed)
    size = replace(SIZES[config.model], image_size=config.image_size)
    whole = load_clip(config.init) if config.init else VisionTower(size)
    tower = whole.vision if config.init else whole
    for key in ("image_size", "patch_size", "vision_width", "vision_layers", "embed_dim"):
        if getattr(whole.config, key) != getattr(size, key):
            raise ValueError(f"init={config.init}: its {key} is not {getattr(size, key)} as here")
    if config.benchmarks and getattr(whole, "vocabulary", None) is None:
        raise ValueError(f"benchmarks={config.benchmarks}: init={config.init!r} has no vocabulary")
    whole.requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(config.train == "all" or ".qkv." in name)
    return whole.to(device), tower


def accumulate(tower, batch, epoch, config, device):
    """Leave the gradient of the batch's mean loss in .grad; return that loss and the mean 2AFC."""
    total, micro = torch.zeros(2, device=device), config.micro_batch or config.batch_size
    for samples, images, labels in zip(*(part.split(micro) for part in batch)):
        images = augment(images.to(device).flatten(0, 1), samples.flatten(), epoch, config.seed)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            embeddings = tower(images)                                       # (3b,E)
        sides = F.normalize(embeddings.float(), dim=-1).unflatten(0, (-1, 3)).unbind(1)  # (b,E)
        labels, share = labels.to(device), len(labels) / config.batch_size  # so the sum is exact
        loss = share * triplet_loss(*sides, labels, config.margin)
        loss.backward()
        total += torch.stack([loss.detach(), share * two_afc(*sides, labels).mean()])
    return total.tolist()  # waits for the device; 0.1 s steps do not notice


def look(whole, tower, splits, folder, config, device):
    """Loss and 2AFC of splits, main metrics of the zero-shot sets in `folder`, if any; float32."""
    figures = {}
    for triplets in splits:
        sides = embed_triplets(tower.forward, triplets, config.image_size, device)  # 3 x (n,E)
        labels = torch.from_numpy(triplets.labels)                           # (n,)
        figures[f"{triplets.split}_loss"] = triplet_loss(*sides, labels, config.margin).item()
        figures[f"{triplets.split}_2afc"] = two_afc(*sides, labels).mean().item()
    for name, path in find_sets(folder).items() if folder else ():
        result = evaluate_set(whole, Tokenizer(whole.vocabulary), path)
        figures[f"zero_shot/{name}"] = result["metrics"][result["main"]]
    return figures


def main(argv=None):
    # ---- 1. settings
    config, others = load_config(Config, globals(), argv)
    if others:
        raise ValueError(f"{others[0]}: perceptual_init.py takes recipes (*.py) and --key=value")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("perceptual_init.py trains on one device; start it without torchrun")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = pathlib.Path(config.out_dir)
    if not config.resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"resume=False: {out} is not empty; empty it or choose another out_dir")

    # ---- 2. triplets, tower and optimizer; then the state of a run that stopped
    train = Triplets(config.data, "train", config.min_votes, config.fraction, config.shuffle_votes,
                     config.seed)
    val, test = (Triplets(config.data, split, config.min_votes) for split in ("val", "test"))
    steps_per_epoch = len(train) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(f"batch_size={config.batch_size}: only {len(train)} training triplets")
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    whole, tower = build(config, device)
    trained = [p for p in tower.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(optimizer_groups(tower, config.weight_decay), lr=config.lr,
                                  betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    state = {"step": 0, "best_loss": math.inf, "before": None,
             "data": "-".join(triplets.fingerprint for triplets in (train, val, test))}
    if (out / "ckpt.pt").exists():
        saved = read_checkpoint(out / "ckpt.pt")
        check_resume(saved["config"] | {"triplets": saved["data"]},
                     asdict(config) | {"triplets": state["data"]},
                     may_change=("data", "out_dir", "benchmarks", "micro_batch", "compile",
                                 "log_every", "save_every", "resume"))
        whole.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {key: saved[key] for key in state}
    for triplets in (train, val, test):  # every image is decoded once, before anything is trained
        triplets.keep(config.image_size)

    def save(name):  # a full disk is a warning: the last good file stays
        content = {"format": FORMAT, "kind": "vision", "model": asdict(whole.config),
                   "weights": whole.state_dict(), "optimizer": optimizer.state_dict(),
                   "samples": state["step"] * config.batch_size, "vocabulary": None,
                   "config": asdict(config)} | state
        if config.init:  # its samples are the pairs it has seen, as before
            content |= {"kind": "clip", "vocabulary": whole.vocabulary,
                        "samples": whole.info["samples"]}
        try:
            write_checkpoint(out / name, content)
        except OSError as error:
            log.say(f"warning: {out / name} not written ({error}); the run goes on")

    # ---- 3. the first lines, and what the tower knows before training
    write_record(out, config, __file__)
    log = RunLog(out, total_steps, state["step"])
    log.say(f"{len(train):,} triplets for {sum(p.numel() for p in trained):,} parameters; at step "
            f"{state['step']} on {device}, checksum {weights_checksum(tower.state_dict())}")
    if state["before"] is None:
        state["before"] = look(whole, tower, (val, test), config.benchmarks, config, device)
        log.write({"step": 0, "samples": 0} | state["before"])
    if config.compile:  # in place: names in the checkpoint stay clean
        tower.compile()

    # ---- 4. the loop; what it changes: `state`, weights, moments, the next batch, and these
    stop, stopped, bad, waited, record = [], False, 0, 0.0, {}
    first, start = state["step"], time.time()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    with ThreadPoolExecutor(1) as ahead:  # gathers the next batch while this one trains
        upcoming = ahead.submit(train.batch, first, config)
        while state["step"] < total_steps and not stopped:
            step, asked = state["step"], time.time()
            batch = upcoming.result()
            waited += time.time() - asked
            upcoming = ahead.submit(train.batch, step + 1, config)
            for group in optimizer.param_groups:
                group["lr"] = rate = lr_at(step, total_steps, config)
            loss, score = accumulate(tower, batch, step // steps_per_epoch, config, device)
            norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip or math.inf).item()
            bad = 0 if math.isfinite(norm) else bad + 1
            if bad == 0:
                optimizer.step()
            else:  # images are bytes: the step size, or a recipe's loss, is to blame
                log.say(f"step {step + 1} skipped: loss {loss}, gradient norm {norm}, triplets of "
                        + ", ".join(train.paths[batch[0][:8, 0] // 3, 0]))
            if bad == 5:
                raise ValueError("five steps in a row without a finite gradient; lower lr")
            optimizer.zero_grad()
            step, stopped = step + 1, bool(stop)
            state["step"] = step

            # ---- 5. log, look, save
            last, record, seconds = step == total_steps, {}, time.time() - start
            if last or step % config.log_every == 0:
                record = {"loss": loss, "2afc": score, "lr": rate, "grad_norm": norm,
                          "data_wait": waited / seconds,
                          "triplets_per_s": (step - first) * config.batch_size / seconds}
            if last or step % steps_per_epoch == 0:
                splits, folder = ((val, test), config.benchmarks) if last else ((val,), "")
                record |= look(whole, tower, splits, folder, config, device)
                if record["val_loss"] < state["best_loss"]:
                    state["best_loss"] = record["val_loss"]
                    save("best.pt")
            if record:
                log.write({"step": step, "samples": step * config.batch_size} | record)
            if last or stopped or step % config.save_every == 0:
                save("ckpt.pt")
    changes = [f", {key} {old:.3f} -> {record[key]:.3f}" for key, old in state["before"].items()
               if key in record]
    log.say(f"step {state['step']} of {total_steps}, {(time.time() - start) / 60:.1f} min"
            + "".join(changes))


if __name__ == "__main__":
    run_main(main)
