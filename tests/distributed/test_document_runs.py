"""Whole runs with documents: packed records train to the losses of one record per row, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import RankError, run_ranks
from test_token_runs import KILLED, STEPS, killed_rank
from training import DEBUG_FILE, TINY, largest_difference, train

from quadriga.checkpoint.folder import find_complete
from quadriga.metrics.documents import read_documents

LENGTHS = (8, 16, 24, 16)  # ids of four records, together a row
ROW = sum(LENGTHS)


def write_records(path: Path, count: int = 1000) -> Path:
    """Instructions of which four fill a row, with BOS and EOS."""
    records = []
    for number in range(count):
        length = LENGTHS[number % 4] - 2
        text = "".join(chr(97 + (number * 7 + place * (1 + number % 5)) % 26) for place in range(length))
        records.append({"question": text[: length // 3], "answer": text[length // 3 :]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def keys(records: Path, *more: str) -> list[str]:
    argv = [each for each in TINY if "global_batch_size" not in each and "seq_len" not in each]
    argv += ["--training.dataset=jsonl", f"--training.dataset_path={records}", "--training.dataset_text_field=answer"]
    argv += ["--training.dataset_prompt={question}", "--training.dataloader.shuffle=false", "--metrics.log_documents"]
    return [*argv, "--checkpoint.enable", "--checkpoint.interval=2", f"--training.steps={STEPS}", *more]


def layout(**degrees: int) -> tuple[str, ...]:
    names = {"fsdp": "data_parallel_shard", "cp": "context_parallel", "tp": "tensor_parallel"}
    return tuple(f"--parallelism.{names[name]}_degree={degree}" for name, degree in degrees.items())


@pytest.mark.more
def test_packed_instructions_train_as_one_record_per_row_also_after_a_kill(tmp_path: Path) -> None:
    """One rank with one record per row; FSDP 2 x CP 2 with packed records, killed, and resumed with TP 2."""
    records = write_records(tmp_path / "instructions.jsonl")
    padded = keys(records, "--training.packing=pad", f"--training.seq_len={max(LENGTHS)}")
    alone = train(tmp_path / "alone", 1, *padded, "--training.global_batch_size=32", "--training.local_batch_size=8")
    argv = keys(records, "--training.document_mask", f"--training.seq_len={ROW}", "--training.global_batch_size=8")
    argv.append("--training.local_batch_size=2")

    folder = tmp_path / "packed"
    run = ["--job.config_file", DEBUG_FILE, f"--job.dump_folder={folder}", *argv, *layout(fsdp=2, cp=2)]
    with pytest.raises(RankError):
        run_ranks(killed_rank, 4, run, backend=None)
    assert find_complete(folder / "checkpoint").step == KILLED - 1
    packed = train(folder, 2, *argv, *layout(fsdp=1, tp=2))
    assert [record["attempt"] for record in packed] == [1] * (KILLED - 1) + [2] * (STEPS - KILLED + 1)
    for name in ("loss", "grad_norm"):
        assert largest_difference(packed, alone, name) < 1e-5

    of_rows, of_records = read_documents(folder), read_documents(tmp_path / "alone")
    for step, rows in of_rows.items():
        packed_names = list(dict.fromkeys(name for names in rows.values() for name in names))
        # The last row also ends with the first id of the next record, which is not a label.
        assert packed_names[:32] == [name for names in of_records[step].values() for name in names]
        assert len(packed_names) == 33
    seen = sum(length * (length + 1) // 2 for length in LENGTHS)
    for record in packed:
        assert record["keys_per_token"] == seen / ROW
        assert record["tokens_seen"] == 8 * ROW * record["step"]
    for record in alone:
        assert record["row_fill"] == pytest.approx((ROW - 4) / 4 / max(LENGTHS))
        assert record["tokens_seen"] == 8 * (ROW - 4) * record["step"]
