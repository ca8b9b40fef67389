"""The examples of docs/data.md about token files: the files are written, and the runs are dry runs."""

from __future__ import annotations

import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
from training import DEBUG_FILE, ROOT

from quadriga.launch.supervisor import main

SECTION = (ROOT / "docs/data.md").read_text(encoding="utf-8").partition("\n## Token files\n")[2].partition("\n## ")[0]


def block(language: str) -> str:
    (found,) = re.findall(rf"(?ms)^```{language}\n(.*?)^```", SECTION)
    return found


def dry_run(argv: list[str], capsys: pytest.CaptureFixture[str], file: str = DEBUG_FILE) -> str:
    code = main(argv, {"CONFIG_FILE": file, "NGPU": "1", "DRY_RUN": "1"})
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    assert "Ready to train." in shown.out
    return shown.out


def test_the_file_is_written_and_trained_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    command = shlex.split(block("bash").replace("\\\n", " "))
    assert command[0] == "./run_train.sh"
    shown = dry_run(command[1:], capsys)
    (printed,) = re.findall(r"(?m)^    (data  .*)", SECTION)
    assert " ".join(printed.split()) in " ".join(shown.split())


def test_the_configuration_of_two_formats_is_valid(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.arange(100_000) % 2000
    ids.astype("<u2").tofile("pile_text_document.bin")
    sequences = [np.array([60_000, 40_000], "<i4"), np.array([0, 120_000], "<i8"), np.arange(3, dtype="<i8")]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)  # version, uint16, two sequences, their borders
    Path("pile_text_document.idx").write_bytes(header + b"".join(array.tobytes() for array in sequences))
    magic = np.zeros(256, "<i4")
    magic[:3] = 20240520, 1, len(ids)
    Path("fineweb_val_000000.bin").write_bytes(magic.tobytes() + ids.astype("<u2").tobytes())
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{block("toml")}')
    assert "tokens from pile_text_document: 1 file, 100,000 ids" in " ".join(dry_run([], capsys, "run.toml").split())
