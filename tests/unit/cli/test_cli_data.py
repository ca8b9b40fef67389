"""`quadriga data`: counts, lengths, bad records and rows of data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torchtitan_checkpoints import unpack

from quadriga.cli.main import main
from quadriga.config.schema import TextKeys
from quadriga.data import contents
from quadriga.data.catalogue import open_source
from quadriga.data.rows import row_ids, text_rows, token_row
from quadriga.data.streams import Streams
from quadriga.data.token_files import open_token_files
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.data.windows import Windows
from quadriga.errors import EXIT_OK, EXIT_USAGE

LENGTHS = [0, 1, 5, 5, 30, 70, 200]


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    for part in range(2):
        lines = [json.dumps({"text": "x" * length}) for length in LENGTHS[part::2]]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def shown(capsys: pytest.CaptureFixture[str], *argv: object, code: int = EXIT_OK) -> str:
    capsys.readouterr()
    assert main(["data", *map(str, argv)]) == code
    return capsys.readouterr().out


def test_texts_are_counted_and_shown(tmp_path, capsys):
    report = shown(capsys, write_texts(tmp_path / "a"), "--seq-len", "20", "--rows", "1")
    assert "files        2\n" in report
    assert f"documents    {len(LENGTHS)}\n" in report
    assert f"tokens       {sum(LENGTHS) + 2 * len(LENGTHS)}\n" in report
    assert "  64 to 127  ####################                      1" in report
    assert "  0:0:0  " in report
    assert f"{tmp_path}/a/0.jsonl, line 1  (2 ids)\n    | <bos><eos>\n" in report
    assert "(12 ids, continues)\n    | <bos>xxxxxxxxxxx\n" in report


def test_token_files_show_ids_and_with_a_tokenizer_text(tmp_path, capsys):
    assert (
        main(["tokenize", str(write_texts(tmp_path / "a")), str(tmp_path / "out"), "--tokenizer", "builtin:bytes"])
        == EXIT_OK
    )
    report = shown(capsys, tmp_path / "out", "--seq-len", "5")
    assert f"documents    {len(LENGTHS)}\n" in report
    assert "    | 256 257\n" in report
    assert "  0:0:1  " in report
    assert "    | <bos><eos>\n" in shown(capsys, tmp_path / "out", "--seq-len", "5", "--tokenizer", "builtin:bytes")


def test_ids_of_other_programs_are_counted_by_their_end(tmp_path, capsys):
    ids = np.array([3, 4, 9, 5, 9, 6], "<u2")
    ids.tofile(tmp_path / "a.bin")
    how = ["--dataset", "tokens", "--token-dtype", "uint16", "--token-eos-id", "9", "--seq-len", "5"]
    report = shown(capsys, tmp_path / "a.bin", *how, "--rows", "1")
    assert "documents    2\n" in report
    assert "    | 3 4 9\n" in report
    assert "token 5  (1 id, continues)\n    | 6\n" in report
    assert main(["data", str(tmp_path / "a.bin")]) == EXIT_USAGE
    assert "set --token-dtype" in capsys.readouterr().err


def test_control_characters_are_escaped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a\x1b[2Jb\nc\u202ed\x07" + "e" * 60)
    report = shown(capsys, tmp_path / "a.txt", "--seq-len", "40")
    assert r"<bos>a\x1b[2Jb\nc\u202ed\x07ee" in report
    assert report.replace("\n", "").isprintable()
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\x1b]0;t\x07" * 9}) + "\n")
    assert shown(capsys, tmp_path / "b.jsonl", "--seq-len", "9").replace("\n", "").isprintable()


def test_large_data_are_sampled_unless_all_is_to_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contents, "SAMPLED_BYTES", 1000)
    monkeypatch.setattr(contents, "SAMPLED_IDS", 1000)
    folder = tmp_path / "a"
    folder.mkdir()
    for part in range(10):
        (folder / f"{part}.jsonl").write_text((json.dumps({"text": "x" * 98}) + "\n") * 50)
    assert "documents    20 in a sample (--verify reads everything)" in shown(capsys, folder)
    report = shown(capsys, folder, "--verify")
    assert "documents    500\n" in report
    assert main(["tokenize", str(folder), str(tmp_path / "out"), "--tokenizer", "builtin:bytes"]) == EXIT_OK
    assert "documents    10 in a sample" in shown(capsys, tmp_path / "out")
    assert "documents    500\n" in shown(capsys, tmp_path / "out", "--verify")


def test_bad_records_are_counted_and_named(tmp_path, capsys):
    lines = ['{"text": "a"}', '{"text": 3}', "{", '{"text": "b"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = shown(capsys, tmp_path / "a.jsonl", "--seq-len", "4", code=EXIT_USAGE)
    assert "documents    2\n" in report
    assert "bad records  2\n" in report
    assert f"{tmp_path}/a.jsonl, line 2" in report
    assert "not JSON" in report


def test_changed_shards_are_found_when_everything_is_read(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["tokenize", str(write_texts(tmp_path / "a")), str(out), "--tokenizer", "builtin:bytes"]) == EXIT_OK
    content = bytearray((out / "00000.bin").read_bytes())
    content[0] ^= 1
    (out / "00000.bin").write_bytes(content)
    assert "its bytes are not those" not in shown(capsys, out, "--seq-len", "4")
    assert "its bytes are not those" in shown(capsys, out, "--seq-len", "4", "--verify", code=EXIT_USAGE)


def test_a_configuration_names_the_data(tmp_path, capsys):
    write_texts(tmp_path / "a")
    file = tmp_path / "run.toml"
    file.write_text(
        f'[model]\nflavor = "debugmodel"\n[training]\ndataset = "jsonl"\ndataset_path = "{tmp_path}/a"\nseq_len = 8\n'
    )
    report = shown(capsys, file, "--rows", "1")
    assert f"data         jsonl from {tmp_path}/a\n" in report
    assert f"{tmp_path}/a/0.jsonl, line 2  (7 ids)" in report


def test_rows_of_texts_are_the_windows_of_their_stream(tmp_path):
    source = open_source(TextKeys("jsonl", str(write_texts(tmp_path / "a"))), streams=3)
    for count, seed, overlap in ((1, None, 1), (1, None, 0), (3, 5, 1)):
        streams = Streams(source, ByteTokenizer(), 16, count, seed, endless=False, overlap=overlap)
        for stream in range(count):
            windows = list(streams.windows(stream))
            rows = list(text_rows(streams, stream))
            assert [row_ids(row) for row in rows] == [window.ids.tolist() for window in windows]
            assert [tuple(part.document for part in row) for row in rows] == [window.documents for window in windows]


def test_rows_of_token_files_are_their_documents(tmp_path):
    ids = np.random.default_rng(0).integers(0, 6, 400).astype("<u2")
    for number in range(2):
        ids[number * 200 :][:200].tofile(tmp_path / f"{number}.bin")
    for eos_id in (0, None):
        files = open_token_files(str(tmp_path), token_dtype="uint16", eos_id=eos_id)
        windows = Windows(400, 15, 1, 3)
        for slot in range(60):
            row = token_row(files, windows, slot)
            start, stop = windows.bounds(int(windows.at([slot])[0]))
            assert row_ids(row) == ids[start:stop].tolist()
            names = tuple(part.document[1:] for part in row if part.document)
            assert names == files.documents(start, stop)
            if eos_id is not None:
                assert all((part.ids[:-1] != 0).all() for part in row)
                assert row[0].continued == (start > 0 and ids[start - 1] != 0)
                assert row[-1].continues == (ids[stop - 1] != 0)


def test_pieces_of_a_document_are_counted_once(tmp_path):
    (tmp_path / "a.txt").write_text("line of a text\n" * 1000)
    source = open_source(TextKeys("text", str(tmp_path / "a.txt")))
    assert source.shards > 1
    found = contents.contents_of_text(source, ByteTokenizer(), whole=True)
    assert (found.documents, found.tokens, dict(found.lengths)) == (1, 15_002, {8192: 1})


def test_the_sources_of_a_mixture_are_shown_one_by_one(tmp_path, capsys):
    texts = write_texts(tmp_path / "books")
    np.arange(600).astype("<u2").tofile(tmp_path / "code.bin")
    sources = [f'dataset = "jsonl"\ndataset_path = "{texts}"\nweight = 3']
    sources.append(f'dataset = "tokens"\ndataset_path = "{tmp_path}/code.bin"\ntoken_dtype = "uint16"\nweight = 1')
    tables = "".join(f"[[training.sources]]\n{source}\n" for source in sources)
    (tmp_path / "mixed.toml").write_text("[training]\nseq_len = 16\n" + tables)
    report = shown(capsys, tmp_path / "mixed.toml")
    assert report.startswith("mixture\n2 sources in windows of one source each\nbooks: 75 %, ")
    assert f"data         jsonl from {texts}\n" in report
    assert f"documents    {len(LENGTHS)}\n" in report
    assert f"data         tokens from {tmp_path}/code.bin\n" in report
    assert "with 600 ids\n" in report


def test_a_checkpoint_of_torchtitan_that_is_not_read_is_named(tmp_path, capsys):
    texts = write_texts(tmp_path / "books")
    (tmp_path / "config.toml").write_text(
        f'[job]\ndump_folder = "{tmp_path}"\n[training]\nseq_len = 16\ndataset = "jsonl"\ndataset_path = "{texts}"\n'
    )
    (tmp_path / "environment.json").write_text('{"world_size": 1}')
    unpack("one_rank", tmp_path / "checkpoint")
    assert "the checkpoint of torchtitan of step 3 is not read" in shown(capsys, tmp_path, "--step", "4", "--rows", "1")
    assert "torchtitan" not in shown(capsys, tmp_path, "--step", "3", "--rows", "1")
