"""The memory of a rank does not grow with the data. Each measurement is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MARGIN = 48 << 20  # bytes: a loaded machine changes how far the threads have read ahead

TOKENS = """
import sys
import numpy as np
from quadriga.data.token_files import open_token_files
from quadriga.data.token_loader import TokenReader
from quadriga.data.windows import Windows
files = open_token_files(sys.argv[1], token_dtype="uint16", eos_id=1)
reader = TokenReader(files, Windows(files.length, 2048, 1, seed=3), 1 << 16)
for slot, window in enumerate(reader.windows.at(np.arange(500)).tolist()):
    assert len(reader.read(slot, window).ids) == 2049
"""
TEXT = """
import sys
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
order = dict(seed=1, seq_len=512, global_batch_size=8, rows=range(8), dataloader=Dataloader())
loader = build_loader(TextKeys("jsonl", sys.argv[1]), ByteTokenizer(), **order)
for _ in range(300):
    loader.next()
loader.close()
"""
# Not `ru_maxrss`: on Linux it includes the memory of the process that started this one.
PEAK = """
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def peak(program: str, path: Path) -> int:
    """The largest resident memory of a process that runs the program, in bytes."""
    command = [sys.executable, "-c", program + PEAK, str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return int(subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout)


@pytest.mark.more
def test_token_files_of_any_size_take_the_same_memory(tmp_path):
    """10^9 and 10^11 ids, in sparse files of 1 and 2 GB."""
    peaks = []
    for count, files in ((10**9, 2), (10**11, 100)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(files):
            with (folder / f"{number:03d}.bin").open("wb") as file:
                file.write(b"\0\3\7\1" * 256)  # zeros alone are not recognized as ids
                file.truncate(2 * count // files)
        peaks.append(peak(TOKENS, folder))
    assert abs(peaks[1] - peaks[0]) < MARGIN


@pytest.mark.more
def test_texts_of_any_size_take_the_same_memory(tmp_path):
    """4 MB and 64 MB of JSON lines."""
    line = json.dumps({"text": "some words of a document " * 40}) + "\n"
    peaks = []
    for size in (4 << 20, 64 << 20):
        path = tmp_path / f"{size}.jsonl"
        path.write_text(line * (size // len(line)))
        peaks.append(peak(TEXT, path))
    assert peaks[1] - peaks[0] < MARGIN
