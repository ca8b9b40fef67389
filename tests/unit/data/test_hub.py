"""C4 streamed by `datasets` from a server on this machine that speaks the Hub's paths.

The client is a process of its own, since the Hub's libraries read HF_ENDPOINT when they are imported.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys

import pytest
from corpora import write_jsonl
from dataset_server import COMMIT, c4_repository, hub_server

from quadriga.config.schema import TextKeys
from quadriga.data import stored_arrays
from quadriga.data.hub import HubSource
from quadriga.errors import Fault, UserError

SHARDS, ROWS = 3, 40

CLIENT = """
import json
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.hub import HubSource
from quadriga.data.streams import Streams
from quadriga.data.stream_loader import StreamLoader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

def loader():
    return StreamLoader(Streams(source, ByteTokenizer(), 32, 4, seed=3), 4, range(4), Dataloader(num_workers=2))

def take(loader, steps):
    got = [loader.next().tokens.tolist() for _ in range(steps)]
    loader.close()
    return got

source = open_source(TextKeys("c4"))
streams = Streams(source, ByteTokenizer(), 32, 4, 3, endless=False)
documents = [document.text for stream in range(4) for document, _ in streams.documents(stream)]
held_out = open_source(TextKeys("c4_validation"))
in_order = [document.text for document, _ in Streams(source, ByteTokenizer(), 32, 1, None, endless=False).documents(0)]

def unshuffled(state=None):
    streams = Streams(source, ByteTokenizer(), 32, 1, None, overlap=0)
    made = StreamLoader(streams, 4, range(4), Dataloader(shuffle=False))
    if state is not None:
        made.load_state_dict(state)
    return made

stream = take(unshuffled(), 6)
begun = unshuffled()
stream_resumed = take(begun, 2) + take(unshuffled(json.loads(json.dumps(begun.state_dict()))), 4) == stream
whole = take(loader(), 12)
first = loader()
head = take(first, 5)
second = loader()
second.load_state_dict(json.loads(json.dumps(first.state_dict())))
resumed = head + take(second, 7) == whole

def refused(*named):
    try:
        HubSource(*named, keys=TextKeys("hub"))
    except UserError as error:
        return error.report

print(json.dumps({
    "fingerprint": source.fingerprint, "shards": source.shards, "documents": documents, "resumed": resumed,
    "in_order": in_order, "stream": stream, "stream_resumed": stream_resumed,
    "held_out": [record.data for record in held_out.read(0)],
    "no_repository": refused("nobody/nothing", None, "train"),
}))
"""

OFFLINE = """
from quadriga.config.schema import TextKeys
from quadriga.data.catalogue import open_source
from quadriga.errors import UserError
try:
    open_source(TextKeys("c4"))
except UserError as error:
    print(error.report)
"""


def run_client(code: str, home, root, **environ: str) -> str:
    environ = {**os.environ, "HF_HOME": str(home), "PYTHONPATH": str(root), **environ}
    environ.pop("HF_TOKEN", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_c4_streams_from_the_hub_once_each_and_resumes_exactly(tmp_path, root):
    files = c4_repository(SHARDS, ROWS)
    with hub_server("allenai/c4", files) as (endpoint, requests):
        found = json.loads(run_client(CLIENT, tmp_path, root, HF_ENDPOINT=endpoint))
    assert found["fingerprint"] == "hub:allenai/c4/en/train:3"
    assert found["shards"] == SHARDS
    expected = sorted(f"train {shard} {row}\n" for shard in range(SHARDS) for row in range(ROWS))
    assert sorted(found["documents"]) == expected
    assert found["documents"] != expected
    assert found["held_out"] == [f"validation 0 {row}\n" for row in range(ROWS)]
    assert found["resumed"]
    # In the order of the files, as torchtitan streams them: documents, and windows that do not overlap.
    assert found["in_order"] == [f"train {shard} {row}\n" for shard in range(SHARDS) for row in range(ROWS)]
    ids = [one for text in found["in_order"] for one in (256, *text.encode(), 257)]
    rows = [row for batch in found["stream"] for row in batch]
    assert rows == [ids[at : at + 32] for at in range(0, 33 * len(rows), 33)]
    assert found["stream_resumed"]
    assert "cannot be streamed from the Hub" in found["no_repository"]
    assert any("/resolve/" in request and "c4-train.00002" in request for request in requests)


NO_NETWORK = [
    {"HF_HUB_OFFLINE": "1"},
    pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow),  # tried again and again: 25 s
]


@pytest.mark.parametrize("environ", NO_NETWORK)
def test_without_a_network_the_way_out_is_shown(tmp_path, root, environ):
    report = run_client(OFFLINE, tmp_path, root, **environ)
    assert "dataset allenai/c4" in report
    assert "cannot be streamed" in report
    for way_out in ("HF_ENDPOINT", "HF_TOKEN", "dataset_path", "builtin"):
        assert way_out in report


ANY = """
import json, sys
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.streams import Streams
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

name = "org/texts"

def documents(keys):
    source = open_source(keys, streams=4)
    streams = Streams(source, ByteTokenizer(), 32, 1, None, endless=False)
    return source.fingerprint, source.shards, [document.text for document, _ in streams.documents(0)]

def refused(keys):
    try:
        open_source(keys)
    except UserError as error:
        (problem,) = error.problems
        return [problem.where, problem.what, problem.allowed, problem.nearest, problem.fix]

keys = TextKeys("hub", name, config="small")
print(json.dumps({
    "streamed": documents(keys),
    "local": documents(keys._replace(streaming=False)),
    "pinned": documents(keys._replace(path=name + "@v1", template="{url}{text}")),
    "test": documents(keys._replace(split="test")),
    "part": documents(keys._replace(split="test[:3]", streaming=False)),
    "no_config": refused(keys._replace(config=None)),
    "wrong_config": refused(keys._replace(config="smal")),
    "wrong_split": refused(keys._replace(split="tset", table="validation")),
    "no_column": refused(keys._replace(field="body")),
    "part_streamed": refused(keys._replace(split="test[:3]")),
    "gone": refused(keys._replace(path="nobody/nothing")),
}))
"""

TWO_CONFIGS = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: small/train-*.jsonl
  - split: test
    path: small/test.jsonl
- config_name: large
  data_files: large/*.jsonl
---
"""


def test_any_data_set_of_the_hub_is_streamed_or_downloaded(tmp_path, root):
    train = [[f"train {part} {row}\n" for row in range(40)] for part in range(3)]
    test = [f"test {row}\n" for row in range(9)]
    files = {"README.md": TWO_CONFIGS, "large/a.jsonl": b'{"text": "large"}\n'}
    for name, texts in [*((f"train-{part}", texts) for part, texts in enumerate(train)), ("test", test)]:
        lines = "".join(json.dumps({"text": text, "url": "u ", "n": 1}) + "\n" for text in texts)
        files[f"small/{name}.jsonl"] = lines.encode()
    with hub_server("org/texts", files) as (endpoint, requests):
        found = json.loads(run_client(ANY, tmp_path, root, HF_ENDPOINT=endpoint))
    whole = [text for part in train for text in part]
    assert found["streamed"] == [f"hub:org/texts/small/train:3:{COMMIT}", 3, whole]
    fingerprint, shards, texts = found["local"]
    assert fingerprint == f"hub-local:org/texts/small/train:120:{COMMIT}"
    assert (shards, texts) == (2, whole)
    fingerprint, _, texts = found["pinned"]
    assert fingerprint.startswith(f"hub:org/texts@v1/small/train:3:{COMMIT}:template-")
    assert texts == ["u " + text for text in whole]
    assert found["test"][2] == test
    assert found["part"][2] == test[:3]
    assert any("/v1/" in request or request.endswith("/v1") for request in requests), requests
    where, what, allowed, close, _ = found["no_config"]
    assert (where, allowed, close) == ("training.dataset_config", "small, large", None)
    assert "several configurations" in what
    where, what, allowed, close, _ = found["wrong_config"]
    assert (where, allowed, close) == ("training.dataset_config", "small, large", "small")
    where, what, allowed, close, _ = found["wrong_split"]
    assert (where, allowed, close) == ("validation.dataset_split", "train, test", "test")
    assert "no column `body`" in found["no_column"][1]
    assert "dataset_text_field" in found["no_column"][4]
    assert "cannot be streamed" in found["part_streamed"][1]
    assert "dataset_streaming = false" in found["part_streamed"][4]
    assert "cannot be streamed from the Hub" in found["gone"][1]


def test_a_stream_that_breaks_for_a_moment_reads_on_at_the_same_row(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    path = write_jsonl(tmp_path / "a.jsonl", [f"{i}" for i in range(1000)])
    source = HubSource("json", None, "train", data_files=[str(path)], keys=TextKeys("hub"))
    real, calls = HubSource._cells, []

    def cells(self, shard, start):
        calls.append(start)
        for number, cell in enumerate(real(self, shard, start)):
            if len(calls) < 4 and number == 200:
                raise ConnectionError("reset by peer")
            yield cell

    monkeypatch.setattr(HubSource, "_cells", cells)
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        records = list(source.read(0))
    assert [record.data for record in records] == [f"{i}" for i in range(1000)]
    assert [record.number for record in records] == list(range(1000))
    assert calls == [0, 200, 400, 600]
    assert "after row 200: reset by peer; trying again" in caplog.text


def test_a_stream_that_breaks_says_where_and_what_is_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    path = write_jsonl(tmp_path / "c4-train.00000.json.gz", [f"{i} " + "word " * (i % 90) for i in range(30_000)])
    source = HubSource("json", None, "train", data_files=[str(path)], keys=TextKeys("hub"))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Fault, match=r"streaming json/train stopped in shard 0 after row \d+.*start again"):
        list(source.read(0))


def test_a_row_without_text_is_named(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b'{"text": "good"}\n{"text": null}\n'))
    source = HubSource("json", None, "train", data_files=[str(path)], keys=TextKeys("hub"))
    good, bad = source.read(0)
    assert source.parse(good).text == "good"
    with pytest.raises(UserError, match="json/train, shard 0, row 2"):
        source.parse(bad)
