"""What several rooms' tests share: a small toy world, drawn once.

They run on the CPU, also where there are GPUs: several ask for equal digits, or for two ranks.
"""
import os
import pathlib
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # results do not depend on how many cores the machine has


@pytest.fixture(autouse=True)
def fresh_recipes():
    """A run reads its recipes once; tests run many in one process, so each starts without any."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        file = pathlib.Path(getattr(module, "__file__", None) or "none").resolve()
        foreign = file.is_relative_to(tempfile.gettempdir()) and not file.is_relative_to(ROOT)
        if name.startswith("configs.") or foreign:
            del sys.modules[name]


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """Folder of a toy world with 601 pairs (a prime), in the formats of the real data."""
    from data.prepare import toy
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.main([f"--out={folder}", "--pairs=601", "--held_out=53", "--triplets=400", "--per_set=48",
              "--processes=1"])
    return folder
