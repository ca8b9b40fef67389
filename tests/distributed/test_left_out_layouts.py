"""Records that cannot be read, left out of a real run: the same on every layout and after a resume, and counted."""

from __future__ import annotations

import json

import pytest
from training import TINY, train

from quadriga.metrics.documents import read_documents
from quadriga.metrics.events import read_events

DATA = ("--training.dataset=jsonl", "--training.dataset_text_field=content", "--validation.dataset_text_field=body")
KEYS = (*TINY, *DATA, "--training.dataloader.on_bad_record=skip", "--metrics.log_documents", "--checkpoint.enable")
KEYS += ("--checkpoint.interval=3", "--lr_scheduler.total_steps=6", "--training.mixed_precision_param=float32")
EVERY = 4


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"content": f"<{i}>" + "abc " * (i % 6)}) for i in range(300)]
    lines[::EVERY] = ['{"text": "under another key"}'] * len(lines[::EVERY])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.more
def test_a_run_leaves_out_the_same_on_every_layout_and_after_a_resume(tmp_path, data):
    given = (*KEYS, f"--training.dataset_path={data}")
    straight = train(tmp_path / "one", 1, *given, "--training.steps=6")
    counts = [record["bad_records"] for record in straight]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] > 0
    shown = [event for event in read_events(tmp_path / "one") if event["event"] == "bad_record"]
    assert len(shown) == min(counts[-1], 10)
    for event in shown:
        assert (int(event["place"].removeprefix(f"{data}, line ")) - 1) % EVERY == 0
        assert "no `content`; its keys are 'text'" in event["reason"]

    train(tmp_path / "moved", 1, *given, "--training.steps=3")
    moved = train(tmp_path / "moved", 2, *given, "--training.steps=6")
    compare(tmp_path, straight, moved)
    events = [event for event in read_events(tmp_path / "moved") if event["event"] == "bad_record"]
    assert {event["rank"] for event in events if event["attempt"] == 2} == {0, 1}
    assert [event["place"] for event in events if event["step"] == 1] == [e["place"] for e in shown if e["step"] == 1]


def compare(tmp_path, straight, moved) -> None:
    assert [record["bad_records"] for record in moved] == [record["bad_records"] for record in straight]
    assert [record["loss"] for record in moved] == pytest.approx([record["loss"] for record in straight], rel=1e-5)
    assert read_documents(tmp_path / "moved") == read_documents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
def test_ranks_that_share_their_rows_count_them_once(tmp_path, data, axis):
    given = (*KEYS, f"--training.dataset_path={data}", "--training.steps=6")
    straight = train(tmp_path / "one", 1, *given)
    layout = (f"--parallelism.{axis}_parallel_degree=2", "--training.local_batch_size=2")
    compare(tmp_path, straight, train(tmp_path / "moved", 4, *given, *layout))


def test_a_run_goes_on_where_it_was_after_its_file_was_mended(tmp_path, data):
    """On other ranks than before; a line has grown, so that all bytes after it are elsewhere."""
    given = (*KEYS, f"--training.dataset_path={data}")
    straight = train(tmp_path / "one", 1, *given, "--training.steps=6")
    train(tmp_path / "moved", 1, *given, "--training.steps=3")
    lines = data.read_text().splitlines()
    lines[1] = json.dumps({"id": "x" * 999, **json.loads(lines[1])})
    data.write_text("\n".join(lines) + "\n")
    moved = train(tmp_path / "moved", 2, *given, "--training.steps=6")
    assert [record["bad_records"] for record in moved] == [record["bad_records"] for record in straight]
    assert [record["loss"] for record in moved] == pytest.approx([record["loss"] for record in straight], rel=1e-5)
