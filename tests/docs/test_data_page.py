"""The examples of docs/data.md: the files are written, runs are dry runs, and other commands are run."""

from __future__ import annotations

import json
import logging
import re
import shlex
import struct
from pathlib import Path

import fsspec
import numpy as np
import pytest
from training import DEBUG_FILE, ROOT, TINY, train

from quadriga.cli.main import main as quadriga
from quadriga.launch.supervisor import main
from quadriga.metrics.loggers import Console

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


SECTION, MIXTURES = section("Token files"), section("Mix sources")


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def block(language: str) -> str:
    (found,) = blocks(language, SECTION)
    return found


def commands(name: str) -> list[list[str]]:
    """The commands of a section."""
    lines = "".join(blocks("bash", section(name))).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def write_megatron(prefix: str, ids: np.ndarray, borders: list[int]) -> None:
    """A pair of Megatron with ids of uint16 in sequences of these lengths."""
    ids.astype("<u2").tofile(f"{prefix}.bin")
    starts = 2 * np.cumsum([0, *borders])[:-1]
    sequences = [np.array(borders, "<i4"), starts.astype("<i8"), np.arange(len(borders) + 1, dtype="<i8")]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(borders), len(borders) + 1)
    Path(f"{prefix}.idx").write_bytes(header + b"".join(array.tobytes() for array in sequences))


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


def test_texts_are_tokenized_trained_on_and_reported(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(9):
        Path(f"texts/{number}.txt").write_text(f"line {number}\n" * 5000)
    (program, *tokenize), (launcher, *keys) = commands("Tokenize")
    assert (program, launcher) == ("quadriga", "./run_train.sh")
    assert quadriga(tokenize) == 0
    assert "tokens from shards: 1 file, " in " ".join(dry_run(keys, capsys).split())
    Path("configs").symlink_to(ROOT / "configs")
    for name, *arguments in commands("See what a model sees"):
        assert name == "quadriga"
        if "--step" in arguments:
            train(Path(arguments[1]), 1, *TINY, "--training.steps=1", "--metrics.log_documents")
        assert quadriga(arguments) == 0, arguments
        assert "row 0" in capsys.readouterr().out


def test_shards_are_copied_from_a_store_and_trained_on(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a line\n" * 5000)
    assert quadriga(["tokenize", "texts.txt", "shards", "--tokenizer", "builtin:bytes"]) == 0
    store = fsspec.filesystem("memory")
    store.put("shards/*", "/bucket/shards/")
    (program, *fetch), (launcher, *keys) = commands("Copy from an object store")
    assert (program, fetch[2], launcher) == ("quadriga", "s3://bucket/shards", "./run_train.sh")
    assert quadriga([word.replace("s3://", "memory://") for word in fetch]) == 0
    store.rm("/bucket", recursive=True)
    assert "tokens from copied_shards: 1 file, " in " ".join(dry_run(keys, capsys).split())


def test_the_configuration_of_two_formats_is_valid(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.arange(100_000) % 2000
    write_megatron("pile_text_document", ids, [60_000, 40_000])
    magic = np.zeros(256, "<i4")
    magic[:3] = 20240520, 1, len(ids)
    Path("fineweb_val_000000.bin").write_bytes(magic.tobytes() + ids.astype("<u2").tobytes())
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{block("toml")}')
    assert "tokens from pile_text_document: 1 file, 100,000 ids" in " ".join(dry_run([], capsys, "run.toml").split())


def test_documents_are_made_of_fields_as_on_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("toml", section("Documents of several fields"))
    record = {"title": "Emma", "text": "It is a truth universally acknowledged. " * 20}
    Path("articles.jsonl").write_text(json.dumps(record) + "\n")
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{example}')
    assert "jsonl from articles.jsonl" in " ".join(dry_run([], capsys, "run.toml").split())
    assert quadriga(["data", "run.toml"]) == 0
    assert "# Emma" in capsys.readouterr().out


def test_answers_are_trained_on_as_on_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("toml", section("Documents and rows"))
    records = [{"question": f"What is {number}?", "answer": f"A number. {'It is even. ' * 9}"} for number in range(99)]
    Path("instructions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{example}')
    assert "jsonl from instructions.jsonl" in " ".join(dry_run([], capsys, "run.toml").split())
    assert quadriga(["data", "run.toml"]) == 0
    assert "What is 0?" in capsys.readouterr().out


def test_a_saved_data_set_is_read_as_on_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    (example,) = blocks("toml", section("Formats"))
    split = datasets.Dataset.from_dict({"text": ["It is a truth universally acknowledged. " * 20] * 9})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk("saved")
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{example}')
    assert "arrow from saved" in " ".join(dry_run([], capsys, "run.toml").split())


def test_a_data_set_of_the_hub_is_named_as_on_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("toml", section("Data sets of the Hub"))
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{example}')
    assert "hub from HuggingFaceFW/fineweb-edu" in " ".join(dry_run([], capsys, "run.toml").split())


@pytest.fixture
def _sources(tmp_path: Path, monkeypatch) -> None:
    """The sources of the mixtures."""
    monkeypatch.chdir(tmp_path)
    write_megatron("web_text_document", np.arange(1_000_000) % 250, [500_000, 500_000])
    (np.arange(500_000) % 250).astype("<u2").tofile("code.bin")
    Path("books").mkdir()
    Path("books/1.jsonl").write_text(json.dumps({"text": "It is a truth universally acknowledged. " * 20}) + "\n")


@pytest.mark.usefixtures("_sources")
def test_the_mixture_is_printed_as_on_the_page(capsys) -> None:
    mixture, _ = blocks("toml", MIXTURES)
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{mixture}')
    shown = " ".join(dry_run([], capsys, "run.toml").split())
    printed = re.findall(r"(?m)^    ((?:web|books|code): .*)", MIXTURES)
    assert len(printed) == 3
    for line in printed:
        assert line in shown
    (stages,) = re.findall(r"`(--training.stages=.*?)`", MIXTURES)
    assert "books: 20 % of steps 1 to 900" in " ".join(dry_run(shlex.split(stages), capsys, "run.toml").split())


@pytest.mark.usefixtures("_sources")
def test_tokens_and_epochs_are_printed_with_what_was_asked_for(capsys) -> None:
    _, amounts = blocks("toml", MIXTURES)
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{amounts}')
    steps = f"--training.steps={-(-(3_000_000 + 2 * 1953 * 256) // 4096)}"
    shown = " ".join(dry_run([steps], capsys, "run.toml").split())
    assert "3,000,000 tokens asked for; tokens from web_text_document" in shown
    assert "2 epochs, 2.0 epochs asked for; tokens from code.bin" in shown


def test_validation_sets_are_printed_as_on_the_page(tmp_path: Path, monkeypatch, capsys, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    Path("held_out").mkdir()
    Path("held_out/1.jsonl").write_text(json.dumps({"text": "It is a truth universally acknowledged. " * 900}) + "\n")
    (np.arange(5_000) % 250).astype("<u2").tofile("code.bin")
    text = section("Validate on several sets")
    (sets,) = blocks("toml", text)
    Path("run.toml").write_text(f'extends = "{DEBUG_FILE}"\n\n{sets}')
    shown = " ".join(dry_run([], capsys, "run.toml").split())
    (printed,) = re.findall(r"(?ms)^    (validation  .*?windows)\n\n", text)
    assert " ".join(printed.split()) in shown
    record = {"kind": "validation", "set": "web", "step": 100, "loss": 2.31234, "tokens": 8192, "seconds": 0.4}
    with caplog.at_level(logging.INFO, "quadriga"):
        Console(200, colour=False).write(record)
    assert f"\n    {caplog.messages[-1]}\n" in text
