"""tests/bench/gpu.py: the lines that a GPU will run, run on the CPU; and what it does without one."""
import sys

import pytest
import torch

from tests.bench import gpu


def number(cell):
    """The figure of a cell such as "1,234 (1,200-1,300)"."""
    return float(cell.split()[0].replace(",", ""))


@pytest.mark.parametrize("part, rows", [("ViT-B-32", 4), ("augmentation", 1), ("loss", 1),
                                        ("loader", 1), ("evaluation", 1), ("toy", 1)])
def test_each_part_runs_on_the_cpu_and_gives_its_rows(part, rows):
    make_rows = gpu.ROWS.get(part, gpu.step_rows)
    found = list(make_rows(part, gpu.QUICK, torch.device("cpu")))
    assert len(found) == rows
    for row in found:
        assert len(row) == len(gpu.HEAD) and number(row[1]) > 0


def test_both_sizes_of_settings_have_the_same_names_and_all_parts_end_within_8_minutes():
    assert vars(gpu.FULL).keys() == vars(gpu.QUICK).keys()
    assert set(gpu.FULL.models) | set(gpu.ROWS) == set(gpu.LIMITS)
    assert set(gpu.FULL.models) == set(gpu.QUICK.models)
    assert sum(gpu.LIMITS.values()) < 480


def test_rates_and_times_of_a_row_are_those_of_the_seconds():
    row = gpu.rate_row("what", 100, [2.0, 1.0, 4.0], [4.0, 6.0, 8.0])
    assert row == ["what", "50 (25-100)", "16.7 (12.5-25)", "3.00", "", ""]


def test_share_of_the_peak_is_that_of_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    row = gpu.rate_row("what", 100, [0.5], [], flops=312e9)  # 62.4e12 of 312e12 a second
    assert row[2:5] == ["-", "", "20%"]


def test_what_does_not_fit_is_a_row(monkeypatch):
    def too_large(mark):
        raise torch.OutOfMemoryError("CUDA out of memory")
    found = gpu.measure(too_large, gpu.QUICK, torch.device("cpu"))
    assert found == (None, "")
    assert gpu.rate_row("step", 8, found[0], [2.0])[1:4] == ["does not fit", "4", ""]


def test_a_part_that_is_too_slow_or_fails_is_a_row():
    assert gpu.rows_of("loss", 0.05, quick=True)[0][:2] == ["loss", "not done in 0.05 s"]
    assert gpu.rows_of("no part", 60, quick=True)[0][:2] == ["no part", "ended with 1"]


def test_a_part_that_fails_keeps_the_rows_it_has(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho a warning\necho '[\"step\", \"100\"]'\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    rows = gpu.rows_of("step", 60, quick=True)
    assert rows[0] == ["step", "100"] and rows[1][:2] == ["step", "ended with 3"]


def test_without_a_gpu_it_says_so_and_ends_well(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    gpu.main()
    assert capsys.readouterr().out.startswith("torch sees no GPU here")
