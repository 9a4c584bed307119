"""One picture of a study's search: measures against the length and the kind of stage 1.

    python -m tests.bench.dose out/real/search/comparison.json --out=docs/study/real/dose.png

The file is data.results' comparison with the arms of LENGTHS, and of KINDS beside them; arms that
it lacks are left out. Bars are deviations over seeds. matplotlib is needed.
"""
import json
from dataclasses import dataclass

from configs import load_config
from data.log import run_main

LENGTHS = ("baseline", "pi_tenth", "pi_third", "pi", "pi_triple")
KINDS = ("food", "materials", "pi_best", "pi_10pct", "pi_50pct")
LABELS = {"baseline": "none", "pi_tenth": "1/10", "pi_third": "1/3", "pi": "whole",
          "pi_triple": "3 times", "food": "food\nalone", "materials": "materials\nalone",
          "pi_best": "best, not\nlast", "pi_10pct": "1/10 of\nvotes",
          "pi_50pct": "half of\nvotes"}


@dataclass
class Config:
    out: str = "out/dose.png"


def main(argv=None):
    from matplotlib.figure import Figure
    config, files = load_config(Config, globals(), argv, files=1)
    with open(files[0], encoding="utf-8") as file:
        families = json.load(file)["families"]
    figure = Figure(figsize=(13.2, 3.4), layout="constrained")
    known = ("all classification", "retrieval", "k-NN probe", "judgements", "nights")
    chosen = [family for family in known if family in families]
    for place, family in enumerate(chosen, 1):
        arms = families[family]["arms"]
        axis = figure.add_subplot(1, len(chosen), place)
        shown = []
        for names, form in ((LENGTHS, "o-"), (KINDS, "s")):
            here = [name for name in names if name in arms]
            positions = range(len(shown), len(shown) + len(here))
            means = [100 * arms[name]["mean"] for name in here]
            deviations = [100 * (arms[name]["sd"] or 0) for name in here]
            axis.errorbar(positions, means, deviations, fmt=form, capsize=3)
            shown += here
        axis.axhline(100 * arms["baseline"]["mean"], color="grey", linestyle=":")
        axis.set(title=f"mean of {family}, %", xticks=range(len(shown)))
        axis.set_xticklabels([LABELS[name] for name in shown], fontsize=7)
    figure.supxlabel("stage 1: its length, then other judgements at whole length", fontsize=8)
    figure.savefig(config.out, dpi=120)


if __name__ == "__main__":
    run_main(main)
