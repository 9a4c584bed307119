"""What a run says and leaves behind: log.jsonl, lines in the terminal, progress, its record."""
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from configs import ROOT, recipe_modules

# What a line of the terminal shows, in this order; log.jsonl keeps every figure unrounded.
SHOWN = {"loss": "loss {:.4f}", "chance_loss": "(ln B {:.3f})", "val_loss": "val loss {:.4f}",
         "val_mean_recall@1": "val R@1 {:.3f}", "lr": "lr {:.2e}", "scale": "scale {:.1f}",
         "grad_norm": "|g| {:.2f}", "accuracy": "acc {:.3f}", "2afc": "2AFC {:.3f}",
         "val_2afc": "val 2AFC {:.3f}", "pairs_per_s": "{:.0f} pairs/s",
         "triplets_per_s": "{:.0f} triplets/s", "utilisation": "MFU {:.0%}",
         "data_wait": "wait {:.0%}"}
PROGRESS_EVERY = 0.5 if sys.stdout.isatty() else 10.0  # seconds; a log file gets fewer lines


class RunLog:
    """One JSON object a logged step in out_dir/log.jsonl, and the same as a line to look at.

    Continuing from start_step > 0 drops records after it: they will be written again.
    log_to: "" | "tensorboard" | "wandb", a second place for the numbers (optional packages).
    mute: for all ranks but the first; nothing is written or shown.
    """

    def __init__(self, out_dir, total_steps, start_step=0, log_to="", mute=False):
        self.mute, self.board, self.wandb = mute, None, None
        if mute:
            return
        self.path, self.total, self.start_step = f"{out_dir}/log.jsonl", total_steps, start_step
        self.start_time, self.open_line = time.time(), False
        self._open_second_place(out_dir, log_to)
        kept = []
        if start_step and os.path.exists(self.path):
            with open(self.path) as file:
                for line in file:
                    whole = line.endswith("}\n")  # a crash may have cut the last one
                    if whole and json.loads(line).get("step", 0) <= start_step:
                        kept.append(line)
        write_text(self.path, "".join(kept))

    def _open_second_place(self, out_dir, log_to):
        try:
            if log_to == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(out_dir)
            elif log_to == "wandb":
                import wandb
                self.wandb = wandb
                wandb.init(project="perceptual-initialization", name=str(out_dir), dir=out_dir)
        except ImportError:
            raise ValueError(f"log_to={log_to}: pip install {log_to}") from None

    def write(self, record):
        """Append `record` (numbers and strings, with "step") and show its line."""
        if self.mute:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.say(f"warning: {self.path}: a line was not written ({error}); the run goes on")
        if self.board:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])
        if self.wandb:
            self.wandb.log(record, step=record["step"])
        step, figures = record["step"], []
        for name, form in SHOWN.items():
            if record.get(name) is not None:
                figures.append(form.format(record[name]))
        for name, value in record.items():
            if name.startswith(("zero_shot/", "2afc/")):
                figures.append(f"{name} {value:.3f}")
        eta = "unknown"
        if step > self.start_step:
            seconds_a_step = (time.time() - self.start_time) / (step - self.start_step)
            eta = clock(seconds_a_step * (self.total - step))
        self._show(f"{step:>6}/{self.total} {step / self.total:4.0%}  {'  '.join(figures)}  "
                   f"eta {eta}", in_place=sys.stdout.isatty())

    def say(self, text):
        """Print a line that stays."""
        if not self.mute:
            self._show(text, in_place=False)

    def summary(self, step, samples, more):
        """The last line of a run: how far it came, its time, its peak memory in GiB."""
        if self.mute:
            return
        import torch
        memory = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(0).ru_maxrss
        seconds = time.time() - self.start_time
        rate = samples * (1 - self.start_step / max(step, 1)) / seconds
        self.say(f"step {step:,} of {self.total:,}, {samples:,} samples; {more}; "
                 f"{clock(seconds)}, {rate:,.0f} samples/s, peak memory "
                 f"{memory / 2**30:.2f} GiB")

    def _show(self, text, in_place):
        lead = "\r\033[K" if self.open_line else ""  # rewrite the unfinished line of a terminal
        print(lead + text, end="" if in_place else "\n", flush=True)
        self.open_line = in_place


class Meter:
    """Steps a second, and the share of time spent waiting for data, since it was last read."""

    def __init__(self, step):
        self.step, self.time, self.waited = step, time.time(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for data."""
        start = time.time()
        yield
        self.waited += time.time() - start

    def read(self, step):
        """(steps a second, share of waiting) since the last reading."""
        seconds = time.time() - self.time
        figures = (step - self.step) / seconds, self.waited / seconds
        self.step, self.time, self.waited = step, time.time(), 0.0
        return figures


class Progress:
    """Counts units of work and prints "done of total, rate, time left" now and then.

    name: what is being done; total: units in all; unit: its name in the line.
    done: units that an earlier run has finished already; they do not count in the rate.
    """

    def __init__(self, name, total, unit, done=0):
        self.name, self.total, self.unit = name, total, unit
        self.done = self.done_before = done
        self.start_time, self.shown = None, time.monotonic()

    def add(self, amount=1):
        """Count `amount` more units; print if the last line is old enough."""
        self.done += amount
        if self.start_time is None:  # until now processes were starting: no part of the rate
            self.start_time, self.done_before = time.monotonic(), self.done
        if time.monotonic() - self.shown > PROGRESS_EVERY:
            self.show()

    def show(self):
        """Print the line now."""
        self.shown = time.monotonic()
        rate = (self.done - self.done_before) / max(self.shown - (self.start_time or 0), 1e-3)
        eta = f"{(self.total - self.done) / rate / 60:,.1f} min" if rate else "unknown"
        share = self.done / max(self.total, 1)
        print(f"{self.name}: {self.done:,.0f} of {self.total:,.0f} {self.unit} ({share:.0%}), "
              f"{rate:,.1f} {self.unit}/s, eta {eta}", flush=True)


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def write_text(path, text):
    """Write a text file whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def write_record(out_dir, config, script_file, note=""):
    """Keep in out_dir/record what made this run: config, command, recipes and sources.

    note: what to remember of this start, behind its command.
    """
    record = Path(out_dir) / "record"
    record.mkdir(parents=True, exist_ok=True)
    (record / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    with open(record / "command.txt", "a") as file:  # one line a start: resumes are seen
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}{note}\n")
    sources = [Path(script_file), ROOT / "model.py", ROOT / "evaluate.py"]
    sources += [ROOT / "configs" / "__init__.py"]
    sources += (ROOT / "data").glob("*.py")
    sources += [Path(recipe.__file__) for recipe in recipe_modules()]
    for source in sources:
        target = record / source.resolve().parent.name / source.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def cache_folder(folder):
    """Stands for FOLDER/index if that cannot be written: in $XDG_CACHE_HOME, else ~/.cache."""
    path = Path(folder).resolve()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(cache, "perceptual-init", f"{path.name}-{digest}")


def index_folder(folder):
    """Path of a folder for what is made from FOLDER's files: its index/, else cache_folder."""
    place = Path(folder, "index")
    try:
        place.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()  # os.access is wrong about network disks
    except OSError as error:
        place = cache_folder(folder)
        print(f"{folder}: {error.strerror}; its index goes to {place} (set XDG_CACHE_HOME)")
        place.mkdir(parents=True, exist_ok=True)
    return place


def check_resume(saved, now, may_change=(), change=""):
    """Refuse to go on with other settings than the checkpoint's; both are dicts of settings.

    may_change: settings that change nothing that is learnt. change: names, with commas between,
    of others that may differ this time. Returns {name: (old, new)} of these.
    A setting that the checkpoint does not know is newer than it, and no reason to refuse.
    """
    changed, allowed = {}, change.split(",") if change else []
    for name in allowed:
        if name not in saved and name not in now:
            raise ValueError(f"change={change}: {name} is no setting of this run")
    for name in sorted(saved):
        if name in may_change or saved[name] == now.get(name):
            continue
        if name not in allowed:
            raise ValueError(f"cannot resume: {name} was {saved[name]!r} in the checkpoint, is "
                             f"{now.get(name)!r} now; set it back, choose another out_dir, or "
                             f"accept the change by --change={name}")
        changed[name] = (saved[name], now.get(name))
    return changed


def in_words(changed):
    """{setting: (old, new)} of check_resume as text, "" for none."""
    return "".join(f"; {name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())


_stop = []  # numbers of the signals that asked the run to stop


def stop_on_signals():
    """A list that SIGTERM and Ctrl-C fill, for the loop to look at after each step.

    A second Ctrl-C ends the process at once.
    """
    def note(number, frame):
        _stop.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    _stop.clear()
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return _stop


def run_main(main):
    """Run a script; what the user can mend is one line on stderr and exit code 2.

    ValueError and OSError are the user's by convention; TRACEBACK=1 shows where they came from.
    Until the ranks have met, all of them fail alike, and rank 0 speaks. Loader processes ignore
    SIGTERM; those that an error left behind are killed. After Ctrl-C the exit code is 130, also of
    a run that was saved: a shell then does not begin the next command, which may need it whole.
    """
    rank = os.environ.get("RANK", "0")
    try:
        main()
        if signal.SIGINT in _stop:
            raise KeyboardInterrupt
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        group = sys.modules.get("torch.distributed")
        if rank == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        elif group and group.is_initialized():
            print(f"{Path(sys.argv[0]).name}, rank {rank}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's would raise for the killed
        for child in multiprocessing.active_children():
            child.kill()
