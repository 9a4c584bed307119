"""2AFC of raw pixels: what differs in pixels often differs for people, too.

    python -m tests.bench.pixels data/real/judgements --size=48

The cosine of two pictures' normalised pixels stands in the place of a tower's.
"""
from dataclasses import dataclass

from configs import load_config
from data.judgements import open_judgements
from data.log import run_main
from data.results import table
from evaluate import evaluate_triplets


@dataclass
class Config:
    size: int = 48      # pixels a side
    min_votes: int = 6  # where votes are known


def main(argv=None):
    config, places = load_config(Config, globals(), argv, files=1)
    rows = []
    for name, triplets in open_judgements(places[0], config.min_votes).items():
        tasks = evaluate_triplets(lambda pixels: pixels.flatten(1), triplets, config.size, "cpu",
                                  name=name)
        score = tasks[name]["metrics"]["2afc"]
        rows.append([name, tasks[name]["n"], f"{100 * score:.1f}"])
    print(table(["judgements", "n", "raw pixels, 2AFC, %"], rows))


if __name__ == "__main__":
    run_main(main)
