"""What several rooms' tests share: a small toy world, drawn once."""
import pathlib
import sys
import tempfile

import pytest
import torch

ROOT = str(pathlib.Path(__file__).resolve().parent.parent)
torch.set_num_threads(1)  # results do not depend on how many cores the machine has


@pytest.fixture(autouse=True)
def fresh_recipes():
    """A run reads its recipes once; tests run many in one process, so each starts without any."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        temporary = file.startswith(tempfile.gettempdir()) and not file.startswith(ROOT)
        if name.startswith("configs.") or temporary:  # the project itself may lie in /tmp
            del sys.modules[name]


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory):
    """Folder of a toy world with 601 pairs (a prime), in the formats of the real data."""
    from data.prepare import toy
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.main([f"--out={folder}", "--pairs=601", "--held_out=53", "--triplets=400", "--per_set=48",
              "--processes=1"])
    return folder
