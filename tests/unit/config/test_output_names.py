"""Names that a user gives to outputs: none of them may replace what the run itself writes."""

from __future__ import annotations

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.errors import UserError
from quadriga.models.registry import catalogue


def configured(key: str, value: str) -> Run:
    argv = ["--model.hf_assets_path=builtin:bytes", "--training.dataset=builtin", f"--{key}={value}"]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=1, training=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.save_config_file", "checkpoint"),
        ("job.save_config_file", "checkpoint/step-2/train_state.json"),
        ("job.save_config_file", "../../up.json"),
        ("job.save_config_file", "/tmp/up.json"),
        ("job.save_config_file", "./metrics.jsonl"),
        ("job.save_config_file", "config.toml"),
        ("job.save_config_file", "tb"),
        ("job.save_config_file", "."),
        ("checkpoint.folder", "metrics.jsonl"),
        ("checkpoint.folder", "estimates/here"),
        ("metrics.save_tb_folder", "./.lock"),
        ("profiling.save_traces_folder", "config.toml"),
    ],
)
def test_a_name_of_the_run_s_own_outputs_is_refused(key: str, value: str) -> None:
    with pytest.raises(UserError) as refusal:
        configured(key, value)
    assert key in refusal.value.report


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job.save_config_file", "all.json"),
        ("job.save_config_file", "notes/all.json"),
        ("checkpoint.folder", "s3://bucket/run"),
        ("checkpoint.folder", "saved/checkpoints"),
    ],
)
def test_other_names_are_free(key: str, value: str) -> None:
    configured(key, value)
