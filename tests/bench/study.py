"""The study: every arm on the toy world, several seeds each, alike in everything else.

    python -m tests.bench.study                 # 5 seeds, all arms, 2 runs at a time
    python -m tests.bench.study --seeds=2 --steps=300 --out=out/study_quick

Arms: the baseline; PI; PI with permuted votes; PI on 10 % and 50 % of the judgements; and the
judgements after pretraining instead of before. A seed fixes batches, augmentation and the text tower
for all arms of that seed. Every run goes on where it was interrupted; a finished one is not repeated.
Writes OUT/eval (comparison.md, comparison.json: means, standard deviations and intervals over seeds)
and OUT/curve_<seed> (scaling.json and .png from the milestones). The toy has to be drawn before.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

STAGE_1 = {"pi": "toy_nights", "shuffled": "toy_nights_shuffled", "pi_10pct": "toy_nights_10pct",
           "pi_50pct": "toy_nights_50pct"}
ARMS = ("baseline", *STAGE_1, "posthoc")


def run(*command):
    """One script in a process of one thread; its last line is shown, a failure stops the study."""
    done = subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(" ".join(command), "->", done.stdout.strip().splitlines()[-1], flush=True)


def train(arm, seed, options):
    """All stages of one arm and seed; returns its final checkpoint."""
    folder = f"{options.out}/{arm}_{seed}"
    common = (f"--seed={seed}", "--resume=True")
    if arm == "posthoc":  # starts from this seed's finished baseline
        run("perceptual_init.py", "configs/toy_posthoc.py", *common, f"--out_dir={folder}",
            f"--init={options.out}/baseline_{seed}/ckpt.pt", "--benchmarks=")
        return f"{folder}/ckpt.pt"
    start = "--init_vision="
    if arm in STAGE_1:
        run("perceptual_init.py", f"configs/{STAGE_1[arm]}.py", *common,
            f"--out_dir={folder}/stage_1")
        start += f"{folder}/stage_1/ckpt.pt"
    steps = (f"--max_steps={options.steps}",) if options.steps else ()
    run("pretrain.py", "configs/toy.py", *common, *steps, f"--out_dir={folder}", start,
        "--workers=0")  # a study keeps every core busy with runs
    return f"{folder}/ckpt.pt"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="of pretraining; 0: the recipe's")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="out/study")
    options = parser.parse_args()
    arms, files = options.arms.split(","), {}
    with ThreadPoolExecutor(options.processes) as pool:  # seed by seed, so that a part is useful
        for after in (False, True):  # the post-hoc arm waits for its baselines
            jobs = {(arm, seed): pool.submit(train, arm, seed, options)
                    for seed in range(options.seeds) for arm in arms if (arm == "posthoc") == after}
            files |= {key: job.result() for key, job in jobs.items()}
    where = ("--benchmarks=data/toy/benchmarks", "--nights=data/toy/nights")
    run("evaluate.py", *(f"{arm}=" + ",".join(files[arm, seed] for seed in range(options.seeds))
                         for arm in arms), *where, f"--out={options.out}/eval")
    for seed in range(options.seeds):
        folders = [os.path.dirname(files[arm, seed]) for arm in arms if arm != "posthoc"]
        run("evaluate.py", *folders, *where, f"--out={options.out}/curve_{seed}")
    print(open(f"{options.out}/eval/comparison.md").read())


if __name__ == "__main__":
    main()
