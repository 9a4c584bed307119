"""Seconds from process start to imports done, and to the first finished training step.

    python -m tests.bench.startup

Every run is a fresh process, the cases in turns. "toy" is pretrain.py on a small toy world that is
indexed already, until it prints step 1; "ViT-B-32" draws random weights and makes one update of
batch 8 in fp32, ours and open_clip's (tests/bench/step.py). open_clip imports transformers where
that is installed, which it need not be: "bare" is without. Where torchvision is stood in for
(tests/bench/peer.py) its own imports are missing from open_clip's time.
"""
import subprocess
import sys
import tempfile
import time

import model
from tests.bench import make_batch, options, ratio, spread, start, table
from tests.bench.peer import PeerStep, load_peer

BARE = "import sys; sys.modules['transformers'] = None; "
IMPORTS = {
    "import torch": "import torch",
    "import pretrain": "import pretrain",
    "import evaluate": "import evaluate",
    "import open_clip": "from tests.bench.peer import load_peer; load_peer()",
    "import open_clip, bare": BARE + "from tests.bench.peer import load_peer; load_peer()",
}


def seconds_until(mark, command):
    """Seconds from starting `command` to its first line that begins with `mark`; it runs on."""
    started, seconds = time.perf_counter(), None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if seconds is None and line.strip().startswith(mark):
            seconds = time.perf_counter() - started
    if process.wait() or seconds is None:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}, without {mark!r}")
    return seconds


def first_step(whose, size):
    """In a child process: from nothing to one finished update of batch 8."""
    import torch
    config, device = model.SIZES[size], torch.device("cpu")
    images, tokens = make_batch(config, 8, device)
    if whose == "ours":
        from tests.bench.step import OurStep
        step = OurStep(config, device, "float32")
    else:
        step = PeerStep(load_peer()[0], config, device, "float32")
    step(images, tokens)
    print("done", flush=True)


def cases_of(args, folder, with_peer):
    """{name: (mark, command)}."""
    python = [sys.executable]
    cases = {name: ("done", [*python, "-c", code + "; print('done', flush=True)"])
             for name, code in IMPORTS.items() if with_peer or "open_clip" not in name}
    toy = [*python, "pretrain.py", "configs/toy.py", f"--data={folder}/pairs", "--held_out=",
           f"--vocabulary={folder}/vocabulary/toy.tiktoken", "--max_steps=1"]
    cases["toy, first step"] = ("1/1", toy)  # each run gets an out_dir of its own
    module = [*python, "-m", "tests.bench.startup", f"--size={args.size}"]
    for whose in ["ours"] + ["open_clip"] * with_peer:
        cases[f"{args.size}, first step, {whose}"] = ("done", [*module, f"--alone={whose}"])
    return cases


def main():
    args = options(__doc__, size="ViT-B-32", alone="", peer="open_clip").parse_args()
    if args.alone:
        return first_step(args.alone, args.size)
    if args.quick:
        args.size, args.rounds = "toy", 1
    start(args)
    open_clip, note = load_peer(args.peer)
    print(note)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "data.prepare.toy", f"--out={folder}/toy", "--pairs=400",
                        "--held_out=20", "--triplets=20", "--per_set=20"], check=True,
                       stdout=subprocess.DEVNULL)
        cases = cases_of(args, f"{folder}/toy", open_clip is not None)
        seconds = {name: [] for name in cases}
        for number in range(-1, args.rounds):  # the first round fills the disk cache
            for name, (mark, command) in cases.items():
                out = [f"--out_dir={folder}/out{number}"] if mark == "1/1" else []
                passed = seconds_until(mark, command + out)
                if number >= 0:
                    seconds[name].append(passed)
    peers = {"import pretrain": "import open_clip, bare",
             f"{args.size}, first step, ours": f"{args.size}, first step, open_clip"}
    table(("until", "seconds", "share of open_clip's"),
          [(name, spread(values), ratio(values, seconds[peers[name]]) if name in peers and open_clip
            else "") for name, values in seconds.items()])


if __name__ == "__main__":
    main()
