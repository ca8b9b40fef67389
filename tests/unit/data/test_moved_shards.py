"""Where the shards of a file begin after lines far from those under way went or came, and what a resume then reads."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from quadriga import limits
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data import jsonl, text
from quadriga.data.files import File
from quadriga.data.jsonl import find_anchor, move_cuts
from quadriga.data.loader import Loader
from quadriga.data.sources import Anchor, Record
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

SHARD, COUNT = 1000, 400
LINES = [json.dumps({"text": f"<{i}>" + "abcdefgh"[i % 8] * (i * 37 % 91)}).encode() + b"\n" for i in range(COUNT)]


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(LINES))
    return path


def file_at(path: Path) -> File:
    return File(path, path.name, path.stat().st_size, compressed=path.suffix == ".gz")


class Cut:
    """The file as it was cut, and where a run stood in it."""

    def __init__(self, path: Path, *under_way: int) -> None:
        self.path, self.size = path, path.stat().st_size
        self.starts = list(range(0, self.size, SHARD))
        ends = [*self.starts[1:], self.size]
        found = {number: find_anchor(file_at(path), self.starts[number], ends[number]) for number in under_way}
        self.anchors: dict[int, Anchor] = {number: known for number, known in found.items() if known}
        self.read = {number: self._lines(self.starts, number) for number in under_way}

    def again(self) -> dict[int, list[bytes | None]]:
        """What the shards under way hold now."""
        cuts = move_cuts(file_at(self.path), self.starts, self.size, self.anchors)
        assert cuts == sorted(cuts)
        assert cuts[0] == 0
        return {number: self._lines(cuts, number) for number in self.anchors}

    def _lines(self, starts: list[int], number: int) -> list[bytes | None]:
        end = [*starts, self.path.stat().st_size][number + 1]
        return [line for _, line in jsonl.lines_of(file_at(self.path), starts[number], end)]


def without(path: Path, *ranges: range) -> None:
    gone = {i for some in ranges for i in some}
    path.write_bytes(b"".join(line for i, line in enumerate(LINES) if i not in gone))


@pytest.mark.parametrize("under_way", [[5], [5, 6], [0, 5], [5, 9]], ids=str)
@pytest.mark.parametrize("gone", [range(300, 390), range(300, 320), range(360, COUNT)], ids=str)
def test_lines_that_go_far_behind_leave_the_shard_under_way_as_it_was(path, under_way, gone):
    cut = Cut(path, *under_way)
    without(path, gone)
    assert cut.again() == cut.read


@pytest.mark.parametrize("gone", [(range(10), range(300, 390)), (range(60), range(370, 390))], ids=str)
def test_lines_that_go_on_both_sides_are_found(path, gone, monkeypatch, caplog):
    monkeypatch.setattr(jsonl, "WINDOW", 50)
    cut = Cut(path, 12, 13)
    without(path, *gone)
    assert cut.again() == cut.read
    assert not caplog.records


def test_it_is_reported_where_the_beginning_of_a_shard_is_not_found(path, caplog):
    cut = Cut(path, 3, 12, 13)
    path.write_bytes(b"".join(b"#" + line for line in LINES))
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        cut.again()
    (record,) = caplog.records
    assert record.getMessage().startswith("data: a.jsonl changed, and the first lines of 3 partly read shards")


def test_how_far_a_line_is_looked_for_is_bounded(path, monkeypatch):
    monkeypatch.setattr(jsonl, "WINDOW", 50)
    monkeypatch.setattr(jsonl, "WIDE", 200)
    windows = []
    real = jsonl._matches
    monkeypatch.setattr(jsonl, "_matches", lambda *given: windows.append(given[-1]) or real(*given))
    cut = Cut(path, 12)
    without(path, range(60), range(300, 390))
    cut.again()
    assert set(windows) == {50, 200}
    assert len(windows) == 4


# --- a resume -------------------------------------------------------------------------------------------------------


def make(kind: str, path: Path) -> Loader:
    options = {"seed": 5, "seq_len": 48, "global_batch_size": 2, "rows": range(2), "dataloader": Dataloader()}
    return build_loader(TextKeys(kind, str(path)), ByteTokenizer(), **options)


def test_a_resume_goes_on_where_lines_went_far_behind(path, monkeypatch):
    monkeypatch.setattr(jsonl, "LEAST_RANGE", SHARD)
    monkeypatch.setattr(jsonl, "MOST_RANGE", SHARD)
    loader = make("jsonl", path)
    for steps in count(1):  # until both rows are at the end of a shard, with two shards free behind it
        loader.next()
        state = loader.state_dict()
        shards = [loader.streams.shard(row, loader._cursors[row]) for row in range(2)]
        last = max(shard for shard, _ in shards)
        if last < 14 and min(documents for _, documents in shards) > 5:
            break
        assert steps < 500
    following = [loader.next().tokens[:, :20] for _ in range(1)]
    loader.close()
    first = next(i for i in range(COUNT) if sum(map(len, LINES[:i])) > (last + 1) * SHARD) + 10
    without(path, range(first, first + 60))
    again = make("jsonl", path)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.next().tokens[:, :20].tolist() == following[0].tolist()
    again.close()


def records(loader: Loader) -> list[Record]:
    source = loader.streams.source
    return [record for shard in range(source.shards) for record in source.read(shard)]


def test_a_text_that_grew_is_cut_as_before_and_its_new_part_by_the_same_step(tmp_path):
    path = tmp_path / "a.txt"
    content = "".join(f"line {i} of the text\n" for i in range(3000))
    path.write_text(content)
    loader = make("text", path)
    before = records(loader)
    loader.next()
    state = loader.state_dict()
    loader.close()
    path.write_text(content + content * 4)
    again = make("text", path)
    again.load_state_dict(json.loads(json.dumps(state)))
    now = records(again)
    assert [record.number for record in now[: len(before)]] == [record.number for record in before]
    assert [record.data for record in now[: len(before) - 1]] == [record.data for record in before[:-1]]
    assert b"".join(record.data for record in now) == content.encode() * 5
    assert max(len(record.data) for record in now) <= state["layout"]["step"] + text.LOOK_AHEAD
    assert [record.begins for record in now] == [True] + [False] * (len(now) - 1)
    assert [record.ends for record in now] == [False] * (len(now) - 1) + [True]
    assert again.streams.source.shards == loader.streams.source.shards


# --- the place of a record in a message -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_are_counted_as_long_as_that_is_quick(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"".join(LINES)) if name.endswith("gz") else b"".join(LINES))
    monkeypatch.setattr(limits, "LINES_COUNTED_PACKED" if name.endswith("gz") else "LINES_COUNTED", 2000)
    file, offset = file_at(path), len(LINES[0])
    assert jsonl.format_location(file, offset) == f"{path}, line 2"
    asked = []
    monkeypatch.setattr(jsonl, "line_at", lambda *given: asked.append(given) or 1)
    assert jsonl.format_location(file, 2001) == f"{path}, byte 2,001"
    assert not asked
    assert jsonl.format_location(file, 2000) == f"{path}, line 1"


def test_a_compressed_file_that_is_broken_by_now_has_no_lines_to_count(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(LINES))[:300])
    assert jsonl.format_location(file_at(path), 20_000) == f"{path}, byte 20,000"


def test_a_survey_counts_no_line_of_a_record_that_it_does_not_show(path, monkeypatch):
    path.write_bytes(b"{}\n" + b"".join(LINES))
    asked: list[Callable] = []
    monkeypatch.setattr(jsonl, "format_location", lambda *given: asked.append(given) or "somewhere")
    options = {"seed": 5, "seq_len": 48, "global_batch_size": 2, "rows": range(2)}
    dataloader = Dataloader(on_bad_record="skip")
    build_loader(TextKeys("jsonl", str(path)), ByteTokenizer(), dataloader=dataloader, **options).close()
    assert not asked
    path.write_bytes(b"{}\n" * 3)
    with pytest.raises(UserError, match="somewhere"):
        build_loader(TextKeys("jsonl", str(path)), ByteTokenizer(), dataloader=dataloader, **options)
    assert len(asked) == 1
