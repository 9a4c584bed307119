"""The study: every arm on the toy world, several seeds each, alike in everything else.

    python -m tests.bench.study                 # 5 seeds, all arms, as many runs at once as cores
    python -m tests.bench.study --seeds=2 --steps=300 --out=out/study_quick

Arms: the baseline; PI; PI with permuted votes; PI on 10 % and 50 % of the judgements; and the
judgements after pretraining instead of before, at the rate of the toy's stage 1 (posthoc) and at a
fiftieth of it, as the paper's group has it for NIGHTS (posthoc_slow). A seed fixes batches,
augmentation and the text tower for all arms of that seed. Every run goes on where it was
interrupted; a finished one is not repeated.

Writes to OUT/eval: comparison.md and .json (means, deviations and intervals over seeds),
scaling.json and .png (the milestones of all runs), curves.png (three of its means, for the README),
stage_1.md (2AFC of each arm's tower). The toy has to be drawn before.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.results import draw_scaling, table, write_text

STAGE_1 = {"pi": "toy_nights", "shuffled": "toy_nights_shuffled", "pi_10pct": "toy_nights_10pct",
           "pi_50pct": "toy_nights_50pct"}
POSTHOC = {"posthoc": (), "posthoc_slow": ("--lr=2e-5",)}
ARMS = ("baseline", *STAGE_1, *POSTHOC)
SETS = ("--benchmarks=data/toy/benchmarks", "--nights=data/toy/nights")


def run(*command):
    """One script in a process of one thread; its last line is shown, a failure stops the study."""
    done = subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(" ".join(command), "->", done.stdout.strip().splitlines()[-1], flush=True)


def train(arm, seed, options):
    """All stages of one arm and seed; returns its folder."""
    folder = f"{options.out}/{arm}_{seed}"
    common = (f"--seed={seed}", "--resume=True")
    if arm in POSTHOC:  # starts from this seed's finished baseline
        run("perceptual_init.py", "configs/toy_posthoc.py", *common, f"--out_dir={folder}",
            f"--init={options.out}/baseline_{seed}/ckpt.pt", "--benchmarks=", *POSTHOC[arm])
        return folder
    start = "--init_vision="
    if arm in STAGE_1:
        run("perceptual_init.py", f"configs/{STAGE_1[arm]}.py", *common,
            f"--out_dir={folder}/stage_1")
        start += f"{folder}/stage_1/ckpt.pt"
    steps = (f"--max_steps={options.steps}",) if options.steps else ()
    run("pretrain.py", "configs/toy.py", *common, *steps, f"--out_dir={folder}", start,
        "--workers=0")  # a study keeps every core busy with runs
    return folder


def judge(arm, seed, options):
    """Train, then evaluate all milestones; the result files go where evaluate.py finds them."""
    folder = train(arm, seed, options)
    run("evaluate.py", folder, *SETS, "--workers=0", f"--out={folder}/eval")
    for file in Path(folder, "eval").glob(f"{arm}_{seed}*"):
        shutil.copy(file, f"{options.out}/eval")
    return folder


def stage_1_table(arms, seeds, out):
    """Mean and deviation over seeds of 2AFC, before and after each arm's judgements."""
    rows = []
    for arm in arms:
        logs = [Path(f"{out}/{arm}_{seed}", "stage_1" if arm in STAGE_1 else ".", "log.jsonl")
                for seed in range(seeds)]
        records = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
        rows.append([arm])
        for split in ("val", "test"):
            for when in (0, -1):
                scores = [100 * seed[when][f"{split}_2afc"] for seed in records]
                rows[-1].append(f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}")
    return table(["2AFC, %", "val before", "val after", "test before", "test after"], rows)


def draw_curves(folder):
    """curves.png: three means of scaling.json against samples seen, without their fits."""
    scaling = json.loads(Path(folder, "scaling.json").read_text())
    chosen = {group: {arm: curve | {"fit": None} for arm, curve in scaling["curves"][group].items()}
              for group in ("mean of all classification", "mean of retrieval", "mean of nights")}
    try:
        draw_scaling(scaling | {"curves": chosen}, f"{folder}/curves.png")
    except ImportError:
        print("no curves.png: it needs matplotlib (pip install matplotlib)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of pretraining; 0: the recipe's")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="out/study")
    options = parser.parse_args()
    arms, folders = options.arms.split(","), {}
    os.makedirs(f"{options.out}/eval", exist_ok=True)
    with ThreadPoolExecutor(options.processes) as pool:  # seed by seed, so that a part is useful
        for after in (False, True):  # the post-hoc arms wait for their baselines
            jobs = {(arm, seed): pool.submit(judge, arm, seed, options)
                    for seed in range(options.seeds) for arm in arms if (arm in POSTHOC) == after}
            folders |= {key: job.result() for key, job in jobs.items()}
    run("evaluate.py", *(f"{arm}=" + ",".join(folders[arm, seed] for seed in range(options.seeds))
                         for arm in arms), *SETS, f"--out={options.out}/eval")
    judged = [arm for arm in arms if arm != "baseline"]
    write_text(f"{options.out}/eval/stage_1.md",
               stage_1_table(judged, options.seeds, options.out) + "\n")
    draw_curves(f"{options.out}/eval")
    for name in ("stage_1.md", "comparison.md"):
        print(Path(options.out, "eval", name).read_text())


if __name__ == "__main__":
    main()
