"""What a run says and leaves behind: log.jsonl, lines in the terminal, progress, the record."""
import dataclasses
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent

_EVERY = 0.5 if sys.stdout.isatty() else 10.0  # seconds between lines; a log file gets fewer


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
        if time.monotonic() - self.shown > _EVERY:
            self.show()

    def show(self):
        """Print the line now."""
        self.shown = time.monotonic()
        rate = (self.done - self.done_before) / max(self.shown - (self.start_time or 0), 1e-3)
        eta = f"{(self.total - self.done) / rate / 60:,.1f} min" if rate else "unknown"
        share = self.done / max(self.total, 1)
        print(f"{self.name}: {self.done:,.0f} of {self.total:,.0f} {self.unit} ({share:.0%}), "
              f"{rate:,.1f} {self.unit}/s, eta {eta}", flush=True)


def write_record(out_dir, config, script_file):
    """Keep in out_dir/record what made this run: config, command, recipes and sources."""
    from configs import _recipes  # as load_config found them
    record = pathlib.Path(out_dir) / "record"
    record.mkdir(parents=True, exist_ok=True)
    (record / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    with open(record / "command.txt", "a") as file:  # one line a start: resumes are seen
        file.write(time.strftime("%Y-%m-%d %H:%M:%S ") + " ".join(sys.argv) + "\n")
    sources = [script_file, ROOT / "model.py", *(ROOT / "data").glob("*.py"), *_recipes]
    sources += [ROOT / "configs" / "__init__.py"]
    for source in map(pathlib.Path, sources):
        target = record / source.resolve().parent.name / source.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)


def keep_previous(path, count):
    """Keep the file at `path` under a second name, *_1.pt, moving older ones on up to `count`.

    Links and renames only, before it is replaced: at every moment `path` is there and whole.
    """
    names = [path.replace(".pt", f"_{i}.pt") for i in range(1, count + 1)]
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1])):
        if os.path.exists(newer):
            os.replace(newer, older)
    if os.path.exists(names[0]):
        os.remove(names[0])
    os.link(path, names[0])


def check_resume(saved, now, may_change=()):
    """Refuse to resume with other settings than the checkpoint's; both are dicts of settings."""
    for key in sorted(set(saved) | set(now)):
        if key not in may_change and saved.get(key) != now.get(key):
            raise ValueError(f"cannot resume: {key} was {saved.get(key)!r} in the checkpoint, is "
                             f"{now.get(key)!r} now; set it back or choose another out_dir")


# What a line of the terminal shows, in this order; log.jsonl keeps every figure unrounded.
_SHOWN = {"loss": "loss {:.4f}", "chance_loss": "(ln B {:.3f})", "val_loss": "val loss {:.4f}",
          "val_mean_recall@1": "val R@1 {:.3f}",
          "lr": "lr {:.2e}", "scale": "scale {:.1f}", "grad_norm": "|g| {:.2f}",
          "accuracy": "acc {:.3f}", "2afc": "2AFC {:.3f}", "val_2afc": "val 2AFC {:.3f}",
          "pairs_per_s": "{:.0f} pairs/s", "triplets_per_s": "{:.0f} triplets/s",
          "utilisation": "MFU {:.0%}", "data_wait": "wait {:.0%}"}


class RunLog:
    """One JSON object a logged step in out_dir/log.jsonl, and the same as a line to look at.

    Continuing from start_step > 0 drops records after it: they will be written again.
    log_to: "" | "tensorboard" | "wandb", a second place for the numbers (optional packages).
    mute: for all ranks but the first; nothing is written or shown.
    """

    def __init__(self, out_dir, total_steps, start_step=0, log_to="", mute=False):
        self.mute = mute
        if mute:
            return
        self.mirror = _mirror(out_dir, log_to)
        self.path, self.total, self.start_step = f"{out_dir}/log.jsonl", total_steps, start_step
        self.start_time, self.open_line = time.time(), False
        kept = []
        if start_step and os.path.exists(self.path):
            with open(self.path) as file:  # a line cut by a crash does not end in "}"
                lines = [line for line in file if line.endswith("}\n")]
            kept = [line for line in lines if json.loads(line).get("step", 0) <= start_step]
        with open(self.path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(self.path + ".tmp", self.path)

    def write(self, record):
        """Append `record` (numbers and strings, with "step") and show its line."""
        if self.mute:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.mirror(record)
        step, done = record["step"], max(record["step"] - self.start_step, 1)
        eta = (time.time() - self.start_time) / done * (self.total - step)
        figures = [form.format(record[key]) for key, form in _SHOWN.items()
                   if record.get(key) is not None]
        self._show(f"{step:>6}/{self.total} {step / self.total:4.0%}  {'  '.join(figures)}  "
                   f"eta {clock(eta)}", in_place=sys.stdout.isatty())

    def say(self, text):
        """Print a line that stays."""
        if not self.mute:
            self._show(text, in_place=False)

    def _show(self, text, in_place):
        lead = "\r\033[K" if self.open_line else ""  # rewrite the unfinished line of a terminal
        print(lead + text, end="" if in_place else "\n", flush=True)
        self.open_line = in_place


def _mirror(out_dir, log_to):
    """A function of a record that sends its numbers to TensorBoard or Weights & Biases, or not."""
    try:
        if log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out_dir)
            return lambda record: [writer.add_scalar(key, value, record["step"])
                                   for key, value in record.items() if isinstance(value, float)]
        if log_to == "wandb":
            import wandb
            wandb.init(project="perceptual-initialization", name=out_dir, dir=out_dir)
            return lambda record: wandb.log(record, step=record["step"])
    except ImportError:
        raise ValueError(f"log_to={log_to}: pip install {log_to}") from None
    return lambda record: None


def clock(seconds):
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def stop_on_signals():
    """A list that SIGTERM and Ctrl-C fill, for the loop to look at after each step."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    return stop


def run_main(main):
    """Run a script; what the user can mend is one line on stderr and exit code 2.

    ValueError and FileNotFoundError are the user's by convention; TRACEBACK=1 shows where.
    Loader processes ignore SIGTERM; those that an error left behind are killed.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{pathlib.Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        for child in multiprocessing.active_children():
            child.kill()
