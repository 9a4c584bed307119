"""Pictures of what data/results.py compares; matplotlib is needed, and an ImportError without."""
import math

import numpy as np


def draw_comparison(comparison, path):
    """Differences to the first arm as a PNG: a line for each family's mean and each set.

    Bars are 95 % intervals, over seeds where there are several, else over test samples.
    """
    from matplotlib.figure import Figure
    lines = []  # (label, {arm: statistics})
    for family, mean in comparison["families"].items():
        lines.append((f"mean of {family}", mean["arms"]))
        for name in mean["sets"]:
            record = comparison["sets"][name]
            if record["family"] == family:  # "all classification" repeats them
                main = {arm: values[record["main"]] for arm, values in record["arms"].items()}
                lines.append((name, main))
    arms = list(comparison["counts"])
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(lines)), layout="constrained")
    axis = figure.add_subplot()
    for color, arm in enumerate(arms):
        shift = 0.6 * ((color + 0.5) / len(arms) - 0.5)  # arms of a set lie below each other
        label = arm
        for line, (_, values) in enumerate(lines):
            value, height = values.get(arm, {}), line + shift
            if "delta" not in value:
                continue
            ends = value["delta_seed_interval"] or value["delta_interval"]
            if ends:
                axis.plot(100 * np.array(ends), [height, height], f"-C{color}")
            axis.plot(100 * value["delta"], height, f"oC{color}", label=label)
            label = None  # one entry in the legend
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlabel=f"difference to {comparison['baseline']}, points", ylim=(len(lines), -1),
             yticks=range(len(lines)), yticklabels=[label for label, _ in lines])
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_scaling(scaling, path):
    """Curves as a PNG: a panel for each mean over sets, deviations over seeds, and chance."""
    from matplotlib.figure import Figure
    groups = [group for group in scaling["curves"] if group.startswith("mean of")]
    rows = math.ceil(len(groups) / 3)
    figure = Figure(figsize=(13.2, 3.2 * rows + 0.6), layout="constrained")
    for number, group in enumerate(groups, 1):
        axis = figure.add_subplot(rows, 3, number)
        axis.set(title=group, xscale="log", xlabel="samples seen", ylabel="main metric, %")
        axis.axhline(100 * scaling["chance"][group], color="grey", linestyle=":", label="chance")
        for color, (arm, curve) in enumerate(scaling["curves"][group].items()):
            draw_curve(axis, curve, arm, f"C{color}")
        axis.legend(fontsize=7)
    figure.supxlabel(scaling["caveat"], fontsize=8)
    figure.savefig(path, dpi=120)


def draw_curve(axis, curve, arm, color):
    """One arm of a panel: its points with deviations, and its power law if it has one."""
    fit, label = curve["fit"], arm
    if fit:
        label += f": {fit_cell(fit)}"
        x = np.array(curve["fitted"], float)
        axis.plot(x, 100 * fit["factor"] * x ** fit["exponent"], f"--{color}")
    points = []
    for point in curve["points"]:
        points.append([point["samples"], point["mean"], point["sd"] or 0])
    samples, means, deviations = np.array(points).T  # (points,) each
    axis.errorbar(samples, 100 * means, 100 * deviations, fmt=f"o-{color}", label=label)


def fit_cell(fit):
    """Exponent with its interval, R², and how many points were used."""
    if fit is None:
        return "-"
    ends = " [{:.3f}, {:.3f}]".format(*fit["interval"]) if fit["interval"] else ""
    return f"exponent {fit['exponent']:.3f}{ends}, R² {fit['r2']:.3f}, {fit['points']} points"
