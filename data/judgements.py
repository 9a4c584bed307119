"""Sets of judgements as rows of an evaluation: where they are, what they are called."""
import pathlib

import numpy as np

from data.triplets import Triplets, csv_file


def open_judgements(places, min_votes, nights=""):
    """{name: Triplets} of the test splits that find_judgements finds; nights: one so called."""
    found = {"nights": nights} if nights else {}
    for name, file in find_judgements(places).items():
        if name in found:
            raise ValueError(f"{file}: {name} is the name of another set; rename it")
        found[name] = file
    return {name: Triplets(file, "test", min_votes) for name, file in found.items()}


def find_judgements(places):
    """{name: CSV} of NIGHTS' folder, a CSV, or a folder of such; several with commas between.

    data.csv and triplets.csv are called like their folder, others like themselves.
    """
    found = {}
    for place in filter(None, places.split(",")):
        path = pathlib.Path(place)
        if path.is_file() or (path / "data.csv").is_file():
            files = [csv_file(path)]
        else:
            files = sorted([*path.glob("*.csv"), *path.glob("*/*.csv")])
        if not files:
            raise FileNotFoundError(f"{place}: no such folder of judgements, or no CSV in it")
        for file in files:
            general = file.name in ("data.csv", "triplets.csv")
            name = file.absolute().parent.name if general else file.stem
            if name in found:
                raise ValueError(f"{file} and {found[name]} are both called {name}; rename one")
            found[name] = file
    return found


def parts(triplets, name):
    """{name: (n,) bool}: all, and where the file tells ImageNet's apart, these and the others."""
    found = {name: np.ones(len(triplets), bool)}
    if triplets.is_imagenet is not None:
        found[f"{name}-imagenet"] = triplets.is_imagenet
        found[f"{name}-no-imagenet"] = ~triplets.is_imagenet
    return {part: chosen for part, chosen in found.items() if chosen.any()}


def about(triplets, name, part, count):
    """What a result file says of `count` triplets of the set `name` that are called `part`."""
    return {"main": "2afc", "family": "nights" if name == "nights" else "judgements",
            "part_of": None if part == name else name, "type": "2afc", "n": count,
            "classes": 2, "templates": 0, "captions": 0,
            "samples_sha256": triplets.fingerprint}
