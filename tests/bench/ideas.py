"""The ideas of configs/ideas on the toy world, each at its own question, over several seeds.

    python -m tests.bench.ideas                          # all arms, 3 seeds, one run at a time
    python -m tests.bench.ideas --ideas=negclip,zscl     # the arms that their questions need
    python -m tests.bench.ideas --run=False              # only the table, of what is finished

An arm is a list of commands in ARMS. A question is an entry of QUESTIONS, which names two figures
of ideas_questions.py. A seed fixes batches, crops and first weights for all its arms. A bench
that was stopped goes on: finished runs (OUT/ARM_SEED/measured.json) are not repeated.

Writes OUT/table.md and OUT/table.json: baseline, idea, their difference with a 95 % interval of
Student's t over the paired seeds. A question that is not finished says "not measured yet".
"""
import json
import os
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configs import load_config
from data.log import run_main
from data.results import seed_statistics, table, write_json, write_text

# What all runs share. They are short: they compare arms, and do not show what an idea can reach.
COMMON = {
    "pretrain.py": ("--workers=0 --warmup_steps=50 --log_every=50 --save_every=100000 "
                    "--keep_at=[] --benchmarks=data/toy/benchmarks --max_steps={steps}"),
    "perceptual_init.py": "--log_every=50 --save_every=100000 --max_steps={stage_1_steps}",
}
WORLDS = {  # beside data/toy, whose held-out pairs and sets serve them all
    "five": "--captions=5 --pairs=8000 --triplets=40 --per_set=40",
    "wrong": "--wrong=0.5 --pairs=8000 --triplets=40 --per_set=40",
}
TOY = "pretrain.py configs/toy.py"
IDEA = f"{TOY} configs/ideas/"
FROM_PLAIN = " --init={plain}/ckpt.pt --max_steps={after_steps} --warmup_steps=10 --lr=5e-4"
FIVE = " --data={out}/five/pairs"
WRONG = " --data={out}/wrong/pairs"
SKEWED = f"{TOY} tests/bench/ideas_skewed.py"
JUDGE = "perceptual_init.py configs/toy_nights.py"
# {run}: the folder of this arm and seed; {plain}, {tower}: those arms' of the same seed.
ARMS = {
    "plain": [TOY],
    "negclip": [IDEA + "negclip.py"],
    "hqclip": [IDEA + "hqclip.py"],
    "svco": [IDEA + "svco.py"],
    "mosaic": [IDEA + "mosaic.py"],
    "pixpro": [IDEA + "pixpro.py"],
    "fdt": [IDEA + "fdt.py"],
    "coca": [IDEA + "coca.py"],
    "sycoca": [IDEA + "sycoca.py"],
    "siglip": [IDEA + "siglip.py"],
    "alone": [IDEA + "alone.py --group=32"],
    "mimetic_init": [IDEA + "mimetic_init.py"],
    # a plain CLIP is trained on
    "onward": [TOY + FROM_PLAIN],
    "refine": [IDEA + "refine.py" + FROM_PLAIN],
    "negclip_after": [IDEA + "negclip.py" + FROM_PLAIN],
    "degla": [IDEA + "degla.py" + FROM_PLAIN],
    "stars": [IDEA + "zscl.py --keep=0" + FROM_PLAIN],  # plain fine-tuning on the narrow domain
    "zscl": [IDEA + "zscl.py" + FROM_PLAIN],
    "zscl_words": [IDEA + "zscl.py --words" + FROM_PLAIN],
    "modx": [IDEA + "modx.py" + FROM_PLAIN],
    "projectors": [IDEA + "lit.py --projectors --init_vision=" + FROM_PLAIN],
    # other data
    "one_line": [TOY + " tests/bench/ideas_one_line.py" + FIVE],
    "five_lines": [TOY + FIVE],
    "captions": [IDEA + "captions.py" + FIVE],
    "wrong": [TOY + WRONG],
    "momentum": [IDEA + "momentum.py" + WRONG],
    "align": [IDEA + "align.py" + WRONG],
    "skewed": [SKEWED],
    "metaclip": [SKEWED + " --balanced"],
    # other batches
    "batch_32": [TOY + " --batch_size=32"],
    "siglip_32": [IDEA + "siglip.py --batch_size=32"],
    # a step costs more or less: at equal steps, and at the plain run's operations
    "slip": [IDEA + "slip.py"],
    "slip_equal": [IDEA + "slip.py --max_steps={slip_steps}"],
    "rocket": [IDEA + "rocket.py"],
    "vitamin": [IDEA + "vitamin.py"],
    "vitamin_equal": [IDEA + "vitamin.py --max_steps={vitamin_steps}"],
    "flip": [IDEA + "flip.py"],
    "flip_equal": [IDEA + "flip.py --max_steps={flip_steps}"],
    # the towers of judgements, and their controls
    "tower": [JUDGE],
    "pi": [TOY + " --init_vision={tower}/ckpt.pt"],
    "lit": [IDEA + "lit.py --init_vision={tower}/ckpt.pt"],
    "lit_random": [IDEA + "lit.py --init_vision="],
    "permuted_init": [IDEA + "permuted_init.py --init_vision={tower}/ckpt.pt"],
    "pictures_tower": [JUDGE + " configs/ideas/same_pictures.py"],
    "same_pictures": [TOY + " --init_vision={pictures_tower}/ckpt.pt"],
    "longer_baseline": [IDEA + "longer_baseline.py --stage_1={tower}/ckpt.pt"],
}
# Operations of a plain step by those of the idea's, as torch.utils.flop_counter counts forward and
# backward of 128 pairs (a test does). Reading pictures is not in it: slip decodes three a pair.
EQUAL = {"slip_steps": 0.44, "vitamin_steps": 0.55, "flip_steps": 1.41}


class Question(NamedTuple):
    idea: str
    text: str
    baseline: tuple     # (arm, figure)
    measured: tuple     # the idea's (arm, figure)
    lower: bool = False    # lower is better
    chance: float = 0.0    # a control: the idea's own figure must stay at this


def same(idea, text, figure, baseline="plain", arm="", **more):
    """A question that asks both arms for the same figure."""
    return Question(idea, text, (baseline, figure), (arm or idea, figure), **more)


CHOICE = "right caption or colours swapped? (50 %)"
BLIND = "control: the mean picture for each (50 %)"
SCENE = "which quarter of a scene? (25 %; two have an object)"
QUESTIONS = [  # in the order of running: ideas first that need few runs of their own
    same("negclip", CHOICE, "colors"),
    same("negclip", BLIND, "colors_blind", chance=50),
    same("negclip", "12 sets", "sets"),
    same("zscl", "12 sets after stars, against plain fine-tuning", "sets", "stars"),
    same("zscl", "control: plain fine-tuning against before", "sets", "plain", "stars"),
    same("modx", "R@1 after stars, against plain fine-tuning", "recall", "stars"),
    same("modx", "control: plain fine-tuning against before", "recall", "plain", "stars"),
    same("siglip", "R@1 at batch 128", "recall"),
    same("refine", "distance of the two means, against plain steps", "gap", "onward",
         lower=True),
    same("refine", "12 sets, against plain steps", "sets", "onward"),
    same("flip", "R@1 at equal steps", "recall"),
    same("flip", "R@1 at equal operations", "recall", "plain", "flip_equal"),
    same("alone", "R@1, four groups of 32", "recall"),
    Question("coca", "nats a word, against unigrams", ("coca", "unigrams"), ("coca", "words"),
             lower=True),
    Question("coca", "control: own picture against another's", ("coca", "words_blind"),
             ("coca", "words"), lower=True),
    same("coca", "R@1", "recall"),
    same("fdt", "R@1", "recall"),
    Question("fdt", "codes of a picture, against all 256", (None, 256), ("fdt", "codes"),
             lower=True),
    same("hqclip", CHOICE, "colors"),
    same("hqclip", BLIND, "colors_blind", chance=50),
    same("hqclip", "`toy_color`", "toy_color"),
    same("hqclip", "`toy_shape`", "toy_shape"),
    same("mosaic", "which tile of a mosaic? (25 %)", "tile"),
    same("mosaic", SCENE, "quarter"),
    same("mosaic", "control: the mean text for each", "quarter_blind"),
    same("mimetic_init", "12 sets: what does a rule give?", "sets"),
    same("align", "R@1, half of the captions wrong", "recall", "wrong"),
    same("momentum", "R@1, half of the captions wrong", "recall", "wrong"),
    same("degla", "right caption, after 100 steps from plain (50 %)", "colors",
         "negclip_after"),
    same("degla", "12 sets kept, against negclip from there", "sets", "negclip_after"),
    same("degla", "control: negclip from there against the start", "sets", "plain",
         "negclip_after"),
    same("metaclip", "12 sets on a skewed world", "sets", "skewed"),
    same("lit", "12 sets: PI's tower locked against a random one", "sets", "lit_random"),
    same("lit", "12 sets: PI's tower locked against trained on", "sets", "pi"),
    same("lit", "`toy_shape`: PI's tower locked against random", "toy_shape", "lit_random"),
    same("lit", "12 sets: PI's tower trained on against plain", "sets", "plain", "pi"),
    same("permuted_init", "12 sets: PI against its tower permuted", "sets", "permuted_init",
         "pi"),
    same("permuted_init", "12 sets: permuted against plain", "sets"),
    same("captions", "R@1: three at once against one of five", "recall", "five_lines"),
    same("captions", "R@1: one of five (LaCLIP) against the same one", "recall", "one_line",
         "five_lines"),
    same("svco", "\"left\" or \"right\"? (50 %)", "sides"),
    same("svco", BLIND, "sides_blind", chance=50),
    Question("sycoca", "nats a word, against unigrams", ("sycoca", "unigrams"),
             ("sycoca", "words"), lower=True),
    same("sycoca", "`toy_place`", "toy_place"),
    same("longer_baseline", "12 sets: PI against more steps", "sets", "longer_baseline", "pi"),
    same("same_pictures", "12 sets: PI against its pictures alone", "sets", "same_pictures",
         "pi"),
    same("slip", "`toy_shape` at equal steps", "toy_shape"),
    same("slip", "`toy_shape` at equal operations", "toy_shape", "plain", "slip_equal"),
    same("rocket", "`toy_shape` at equal steps", "toy_shape"),
    same("rocket", "`toy_shape`, against slip", "toy_shape", "slip"),
    same("vitamin", "`toy_shape` at equal steps", "toy_shape"),
    same("vitamin", "`toy_shape` at equal operations", "toy_shape", "plain", "vitamin_equal"),
    same("vitamin", "`toy_shape_outline` at equal operations", "toy_shape_outline", "plain",
         "vitamin_equal"),
    same("pixpro", "`toy_shape`", "toy_shape"),
    same("pixpro", SCENE, "quarter"),
    same("zscl", "VR-LwF's random words, against plain fine-tuning", "sets", "stars",
         "zscl_words"),
    same("siglip", "R@1 at batch 32", "recall", "batch_32", "siglip_32"),
    same("lit", "R@1: projectors alone against plain steps", "recall", "onward",
         "projectors"),
]


@dataclass
class Config:
    seeds: int = 3           # 0, 1, ...
    ideas: str = ""          # with commas between; "": all, in the order of QUESTIONS
    steps: int = 250         # of a run from the start
    after_steps: int = 100   # of one from a trained model
    stage_1_steps: int = 150  # of the judgements
    processes: int = 1       # runs at once, of one thread each
    run: bool = True         # False: only the table, of what is finished
    out: str = "out/ideas"

    def check(self):
        known = dict.fromkeys(question.idea for question in QUESTIONS)
        for idea in self.ideas.split(",") if self.ideas else ():
            if idea not in known:
                raise ValueError(f"ideas={self.ideas}: {idea} is none of {', '.join(known)}")
        for name in ("seeds", "steps", "after_steps", "stage_1_steps", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


# ------------------------------------------------------------------------------ running

def folder(arm, seed, config):
    return f"{config.out}/{arm}_{seed}"


def needs(arm):
    """The arms whose folders an arm's commands name, e.g. plain for one that goes on from it."""
    named = set()
    for command in ARMS[arm]:
        for _, field, _, _ in string.Formatter().parse(command):
            if field in ARMS:
                named.add(field)
    return sorted(named)


def queue(questions):
    """The arms of these questions, each once and behind those that it needs."""
    found = []
    for question in questions:
        for arm, _ in (question.baseline, question.measured):
            if arm is None:  # a number, not an arm
                continue
            for one in [*needs(arm), arm]:
                if one not in found:
                    found.append(one)
    return found


def words_of(command, arm, seed, config):
    """A command of an arm with all that is common, as the words of an argument list."""
    values = vars(config) | {"run": folder(arm, seed, config)}
    for name, share in EQUAL.items():
        values[name] = round(share * config.steps)
    for one in ARMS:
        values[one] = folder(one, seed, config)
    script, *own = command.split()
    recipes = [word for word in own if word.endswith(".py")]
    own = [word for word in own if not word.endswith(".py")]
    words = [script, *recipes, *COMMON[script].split(), *own]  # of two settings the last counts
    words += ["--out_dir={run}", f"--seed={seed}"]
    return [word.format(**values) for word in words]


def start(words, log):
    """Run one command in a process of one thread; returns its core seconds."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(words)}\n{Path(log).read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def run(arm, seed, config):
    """All commands of one arm and seed, then what its model answers; nothing if it is there."""
    from tests.bench.ideas_questions import measure  # only where torch is needed
    path = folder(arm, seed, config)
    if Path(path, "measured.json").exists():
        return
    os.makedirs(path, exist_ok=True)
    seconds = 0.0
    for command in ARMS[arm]:
        seconds += start(words_of(command, arm, seed, config), f"{path}/output.txt")
    figures = measure(path, arm) | {"core_seconds": round(seconds, 1)}
    write_json(f"{path}/measured.json", figures)
    print(f"{arm}, seed {seed}: done, {seconds:.0f} core seconds", flush=True)


def keep_settings(config):
    """Note what all runs in OUT share; a bench with other settings needs another OUT."""
    own = {}
    for name in ("steps", "after_steps", "stage_1_steps"):
        own[name] = getattr(config, name)
    path = Path(config.out, "settings.json")
    if path.exists() and json.loads(path.read_text()) != own:
        raise ValueError(f"out={config.out}: holds runs of {path.read_text().split()}, not of "
                         f"{own}; name another folder")
    os.makedirs(config.out, exist_ok=True)
    write_json(path, own)


def draw_worlds(config):
    """The toy world and its variants; complete ones stay as they are."""
    module = ["-m", "data.prepare.toy", f"--processes={config.processes}"]
    start(module, f"{config.out}/worlds.txt")
    for name, options in WORLDS.items():
        start([*module, f"--out={config.out}/{name}", *options.split()],
              f"{config.out}/worlds.txt")


def run_all(questions, config):
    """Arm by arm with all seeds, so that a part of the bench is a table already."""
    draw_worlds(config)
    done = {}  # (arm, seed): its job

    def job(arm, seed):
        for one in needs(arm):
            done[one, seed].result()  # those were handed in before, so they are under way
        run(arm, seed, config)

    pool = ThreadPoolExecutor(config.processes)
    try:
        for arm in queue(questions):
            for seed in range(config.seeds):
                done[arm, seed] = pool.submit(job, arm, seed)
        failed = []
        for (arm, seed), one in done.items():
            try:
                one.result()
            except ValueError as error:  # the others are still of use
                failed.append(f"{arm}_{seed}")
                print(f"{arm}, seed {seed}: {error}", flush=True)
            write_tables(questions, config)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing new starts
    if failed:
        raise ValueError(f"failed, see above: {', '.join(failed)}")


# ------------------------------------------------------------------------------ the table

def values_of(side, config):
    """A figure of an arm for each seed, or None if a seed is missing."""
    arm, figure = side
    if arm is None:
        return [figure] * config.seeds
    values = []
    for seed in range(config.seeds):
        path = Path(folder(arm, seed, config), "measured.json")
        if not path.exists():
            return None
        values.append(json.loads(path.read_text())[figure])
    return values


def verdict(difference, idea, question):
    """Three words. An interval that holds 0 tells nothing; a control must hold its chance."""
    if question.chance:
        low, high = idea["interval"]
        return "blind as due" if low <= question.chance <= high else "not quite blind"
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "cannot be told"
    better = (low > 0) != question.lower
    return "better than baseline" if better else "worse than baseline"


def answer(question, config):
    """A question's record: both means, the difference over paired seeds, the verdict."""
    record = question._asdict()
    base, idea = values_of(question.baseline, config), values_of(question.measured, config)
    if base is None or idea is None or config.seeds < 2:
        return record | {"verdict": "not measured yet"}
    differences = [after - before for before, after in zip(base, idea)]
    record["means"] = [seed_statistics(base), seed_statistics(idea)]
    record["difference"] = seed_statistics(differences)
    record["values"] = [base, idea]
    record["verdict"] = verdict(record["difference"], record["means"][1], question)
    return record


def row(record):
    """A record as cells of the table."""
    cells = [f"`{record['idea']}`", record["text"]]
    if "difference" not in record:
        return [*cells, "", "", "", record["verdict"]]
    digits = 2 if record["means"][0]["mean"] < 10 and record["lower"] else 1
    for mean in record["means"]:
        cells.append(f"{mean['mean']:.{digits}f}")
    found = record["difference"]
    low, high = found["interval"]
    cells.append(f"{found['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
    return [*cells, record["verdict"]]


def write_tables(questions, config):
    """OUT/table.md and table.json; returns the Markdown."""
    named = list(dict.fromkeys(question.idea for question in questions))
    by_idea = sorted(questions, key=lambda question: named.index(question.idea))
    records = [answer(question, config) for question in by_idea]
    header = ["idea", "question", "baseline", "idea's", "difference [95 %]", "verdict"]
    text = table(header, [row(record) for record in records])
    write_text(f"{config.out}/table.md", text + "\n")
    write_json(f"{config.out}/table.json", {"config": vars(config), "answers": records})
    return text


def main(argv=None):
    config, _ = load_config(Config, globals(), argv, files=0)
    chosen = config.ideas.split(",") if config.ideas else [one.idea for one in QUESTIONS]
    questions = [question for question in QUESTIONS if question.idea in chosen]
    keep_settings(config)
    if config.run:
        run_all(questions, config)
    print(write_tables(questions, config))


if __name__ == "__main__":
    run_main(main)
