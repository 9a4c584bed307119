"""Files of a data set on the Hugging Face hub, through the library huggingface_hub.

The library reads HF_TOKEN (a set that wants an account) and HF_ENDPOINT (a mirror), goes on
with files that were cut, waits where the hub asks it to, and checks sizes.
"""
import contextlib
from pathlib import Path


def dataset_name(address):
    """"https://huggingface.co/datasets/OWNER/NAME", or "OWNER/NAME" itself -> "OWNER/NAME"."""
    name = address.rstrip("/").rpartition("/datasets/")[2]
    if name.count("/") != 1 or ":" in name:
        raise ValueError(f"{address}: no folder and no data set; write OWNER/NAME, or "
                         "https://huggingface.co/datasets/OWNER/NAME")
    return name


def list_files(name):
    """The newest commit of a data set, and {path: bytes} of its files. Raises ValueError."""
    with one_line(f"data set {name} on the hub"):
        from huggingface_hub import HfApi
        info = HfApi().dataset_info(name, files_metadata=True, timeout=60)
    return info.sha, {file.rfilename: file.size for file in info.siblings}


def fetch_file(name, commit, path, folder, progress=True):
    """Fetch one file into folder/path, unless this commit's is there; returns its Path.

    progress: whether the library draws its bar. Raises ValueError.
    """
    with one_line(f"data set {name} on the hub, {path}"):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars
        if not progress:
            disable_progress_bars()
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=commit,
                                    local_dir=folder))


@contextlib.contextmanager
def one_line(what):
    """Make one ValueError, of one line, of the library's errors and of its absence."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise ValueError("this takes huggingface_hub: pip install huggingface_hub") from None
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:  # HTTPError: nobody answers
        raise ValueError(f"{what}: {' '.join(str(error).split())}") from None
