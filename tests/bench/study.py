"""A study: every arm of a world, several seeds each, alike in everything else.

    python -m data.prepare.toy
    python -m tests.bench.study --arms=baseline,pi,shuffled,posthoc,posthoc_slow     # 5 seeds
    python -m tests.bench.study --seeds=2 --steps=300 --arms=baseline,pi --out=out/quick
    python -m tests.bench.study --world=real --arms=baseline,pi,permuted_votes --out=out/real

An arm is a list of commands in tests/bench/arms.py, so a new one is a line there. A seed fixes
batches, augmentation and the text tower for all arms of that seed. A study that was stopped goes
on where it stopped: the scripts resume their runs, and what is finished is not repeated. So
arms and seeds can be added later, by another command with the same --out.

Writes to OUT/NAME: comparison.md, .json and .png (means, deviations and intervals over seeds),
scaling.md, .json and .png (the milestones of all runs), curves.png (a few of its means),
towers/ (the same of what stage 1 leaves), stage_1.md (2AFC of each arm's tower before and after
its judgements).
"""
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from configs import check_ranges, load_config
from data.log import run_main
from data.plots import draw_scaling
from data.results import seed_statistics, table, write_text
from tests.bench import arms

WORLDS = {  # arms, and how a run or a tower is evaluated
    "toy": (arms.TOY, arms.EVALUATE_TOY), "real": (arms.REAL, arms.EVALUATE_REAL)}


@dataclass
class Config:
    world: str = "toy"          # or "real"
    seeds: int = 5              # 0, 1, ...
    arms: str = "baseline,pi"   # with commas between; the first is the baseline
    steps: int = 0              # of pretraining; 0: the recipe's
    processes: int = os.cpu_count()  # runs at once, of one thread each
    out: str = "out/study"
    name: str = "eval"          # of the folder of comparisons in out

    def check(self):
        check_ranges(self, world=tuple(WORLDS))
        known, _ = WORLDS[self.world]
        for arm in self.arms.split(","):
            if arm not in known:
                raise ValueError(f"arms={self.arms}: {arm} is none of {', '.join(known)}")
        if self.seeds < 1 or self.processes < 1:
            raise ValueError(f"seeds={self.seeds}: seeds and processes must be at least 1")


def folder(arm, seed, config):
    return f"{config.out}/{arm}_{seed}"


def start(command, arm, seed, config):
    """Run one command of an arm and seed in a process of one thread; a failure is an error."""
    words = []
    for word in command.split():
        words.append(word.format(run=folder(arm, seed, config), pi=folder("pi", seed, config),
                                 baseline=folder("baseline", seed, config)))
    if words[0] != "evaluate.py":
        words.append(f"--seed={seed}")
    if words[0] == "pretrain.py" and config.steps:
        words.append(f"--max_steps={config.steps}")
    done = subprocess.run([sys.executable, *words], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def run(arm, seed, config):
    """All commands of one arm and seed, then the evaluation of its tower and its milestones."""
    began = time.monotonic()
    commands, evaluate = WORLDS[config.world]
    for command in commands[arm]:
        start(command, arm, seed, config)
    place = Path(folder(arm, seed, config))
    for part in ("stage_1", "."):
        if (place / part / "ckpt.pt").exists():
            start(evaluate.format(run=place / part), arm, seed, config)
    print(f"{arm}, seed {seed}: done in {(time.monotonic() - began) / 60:.1f} min", flush=True)


def run_all(config):
    """Every arm and seed, seed by seed, so that a part of a study is of use."""
    commands, _ = WORLDS[config.world]
    first, second = [], []
    for arm in config.arms.split(","):
        text = " ".join(commands[arm])
        if "{baseline}" in text or "{pi}" in text:  # starts from what another arm has finished
            second.append(arm)
        else:
            first.append(arm)
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


def compare(part, out, config):
    """comparison.* and scaling.* of the result files of all arms; part: "stage_1" or "."."""
    arguments = []
    for arm in config.arms.split(","):
        files = []
        for seed in range(config.seeds):
            for file in sorted(Path(folder(arm, seed, config), part, "eval").glob("*.json")):
                if file.stem not in ("comparison", "scaling"):
                    files.append(str(file))
        if files:
            arguments.append(f"{arm}={','.join(files)}")
    if arguments:
        command = [sys.executable, "-m", "data.results", *arguments, f"--out={out}"]
        subprocess.run(command, check=True)


def stage_1_table(config):
    """Mean and deviation over seeds of 2AFC, before and after each arm's judgements."""
    rows = []
    for arm in config.arms.split(","):
        commands, _ = WORLDS[config.world]
        if not commands[arm][0].startswith("perceptual_init.py"):
            continue
        part = "stage_1" if "{run}/stage_1" in commands[arm][0] else "."
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
    """curves.png: a few means of scaling.json against samples seen, without their fits."""
    scaling = json.loads(Path(out, "scaling.json").read_text())
    chosen = {}
    for group in ("all classification", "retrieval", "nights", "judgements", "k-NN probe"):
        group = f"mean of {group}"
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
    out = f"{config.out}/{config.name}"
    run_all(config)
    compare("stage_1", f"{out}/towers", config)
    compare(".", out, config)
    text = stage_1_table(config)
    write_text(f"{out}/stage_1.md", text + "\n")
    print(text)
    if Path(out, "scaling.json").exists():
        draw_curves(out)


if __name__ == "__main__":
    run_main(main)
