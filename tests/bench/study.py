"""The study: every arm on the toy world, several seeds each, alike in everything else.

    python -m data.prepare.toy
    python -m tests.bench.study                 # 5 seeds, all arms, as many runs at once as cores
    python -m tests.bench.study --seeds=2 --steps=300 --out=out/study_quick

An arm is a list of commands in ARMS, so a new one is a line there. A seed fixes batches,
augmentation and the text tower for all arms of that seed. A study that was stopped goes on where
it stopped: the scripts resume their runs, and what is finished is not repeated.

Writes to OUT/eval: comparison.md and .json (means, deviations and intervals over seeds),
scaling.md, .json and .png (the milestones of all runs), curves.png (three of its means, for the
README), stage_1.md (2AFC of each arm's tower before and after its judgements).
"""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs import load_config
from data.log import run_main
from data.results import draw_scaling, seed_statistics, table, write_text

# {run}: the folder of this arm and seed.  {baseline}: the baseline's of the same seed.
# A study keeps every core busy with runs, so pretraining loads its batches by itself.
JUDGE = "perceptual_init.py --out_dir={run}/stage_1 configs/"
PRETRAIN = "pretrain.py configs/toy.py --workers=0 --out_dir={run} --init_vision="
PRETRAIN_JUDGED = PRETRAIN + "{run}/stage_1/ckpt.pt"
POSTHOC = ("perceptual_init.py configs/toy_posthoc.py --benchmarks= --out_dir={run} "
           "--init={baseline}/ckpt.pt")
ARMS = {
    "baseline": [PRETRAIN],
    "pi": [JUDGE + "toy_nights.py", PRETRAIN_JUDGED],
    "shuffled": [JUDGE + "toy_nights_shuffled.py", PRETRAIN_JUDGED],  # permuted votes
    "pi_10pct": [JUDGE + "toy_nights_10pct.py", PRETRAIN_JUDGED],
    "pi_50pct": [JUDGE + "toy_nights_50pct.py", PRETRAIN_JUDGED],
    "posthoc": [POSTHOC],  # judgements after pretraining, at the rate of the toy's stage 1
    "posthoc_slow": [POSTHOC + " --lr=2e-5"],  # at a fiftieth of it, as for NIGHTS
}
EVALUATE = ("evaluate.py {run} --benchmarks=data/toy/benchmarks --nights=data/toy/nights "
            "--workers=0 --out={run}/eval")


@dataclass
class Config:
    seeds: int = 5              # 0, 1, ...
    arms: str = ",".join(ARMS)  # with commas between; the first is the baseline
    steps: int = 0              # of pretraining; 0: the recipe's
    processes: int = os.cpu_count()  # runs at once, of one thread each
    out: str = "out/study"

    def check(self):
        for arm in self.arms.split(","):
            if arm not in ARMS:
                raise ValueError(f"arms={self.arms}: {arm} is none of {', '.join(ARMS)}")
        if self.seeds < 1 or self.processes < 1:
            raise ValueError(f"seeds={self.seeds}: seeds and processes must be at least 1")


def folder(arm, seed, config):
    return f"{config.out}/{arm}_{seed}"


def start(command, arm, seed, config):
    """Run one command of an arm and seed in a process of one thread; a failure is an error."""
    words = []
    for word in command.split():
        words.append(word.format(run=folder(arm, seed, config),
                                 baseline=folder("baseline", seed, config)))
    if command != EVALUATE:
        words.append(f"--seed={seed}")
    if words[0] == "pretrain.py" and config.steps:
        words.append(f"--max_steps={config.steps}")
    done = subprocess.run([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def run(arm, seed, config):
    """All commands of one arm and seed, then the evaluation of all its milestones."""
    began = time.monotonic()
    for command in ARMS[arm] + [EVALUATE]:
        start(command, arm, seed, config)
    print(f"{arm}, seed {seed}: done in {(time.monotonic() - began) / 60:.1f} min", flush=True)


def run_all(config):
    """Every arm and seed, seed by seed, so that a part of a study is of use."""
    arms = config.arms.split(",")
    first = [arm for arm in arms if "{baseline}" not in ARMS[arm][0]]
    second = [arm for arm in arms if arm not in first]  # these start from a finished baseline
    for group in (first, second):
        pool, jobs = ThreadPoolExecutor(config.processes), []
        for seed in range(config.seeds):
            for arm in group:
                jobs.append(pool.submit(run, arm, seed, config))
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure nothing new starts


def compare(config):
    """comparison.* and scaling.* of the result files of all arms."""
    arguments = []
    for arm in config.arms.split(","):
        files = []
        for seed in range(config.seeds):
            for file in sorted(Path(folder(arm, seed, config), "eval").glob("*.json")):
                if file.stem not in ("comparison", "scaling"):
                    files.append(str(file))
        arguments.append(f"{arm}={','.join(files)}")
    command = [sys.executable, "-m", "data.results", *arguments, f"--out={config.out}/eval"]
    subprocess.run(command, check=True)


def stage_1_table(config):
    """Mean and deviation over seeds of 2AFC, before and after each arm's judgements."""
    rows = []
    for arm in config.arms.split(","):
        if not ARMS[arm][0].startswith("perceptual_init.py"):
            continue
        part = "stage_1" if "{run}/stage_1" in ARMS[arm][0] else "."
        cells = [arm]
        for split in ("val", "test"):
            for when in (0, -1):
                scores = []
                for seed in range(config.seeds):
                    lines = Path(folder(arm, seed, config), part, "log.jsonl").read_text()
                    record = json.loads(lines.splitlines()[when])
                    scores.append(100 * record[f"{split}_2afc"])
                found = seed_statistics(scores)
                deviation = "" if found["sd"] is None else f" ± {found['sd']:.1f}"
                cells.append(f"{found['mean']:.1f}{deviation}")
        rows.append(cells)
    return table(["2AFC, %", "val before", "val after", "test before", "test after"], rows)


def draw_curves(out):
    """curves.png: three means of scaling.json against samples seen, without their fits."""
    scaling = json.loads(Path(out, "scaling.json").read_text())
    chosen = {}
    for group in ("mean of all classification", "mean of retrieval", "mean of nights"):
        if group in scaling["curves"]:  # not where all its sets are near chance
            chosen[group] = {}
            for arm, curve in scaling["curves"][group].items():
                chosen[group][arm] = curve | {"fit": None}
    try:
        draw_scaling(scaling | {"curves": chosen}, f"{out}/curves.png")
    except ImportError:
        print("no curves.png: it needs matplotlib (pip install matplotlib)")


def main(argv=None):
    config, _ = load_config(Config, globals(), argv, files=0)
    run_all(config)
    compare(config)
    text = stage_1_table(config)
    write_text(f"{config.out}/eval/stage_1.md", text + "\n")
    print(text)
    if Path(config.out, "eval", "scaling.json").exists():
        draw_curves(f"{config.out}/eval")


if __name__ == "__main__":
    run_main(main)
