"""What the tests of the configuration share: a TOML file on disk, read with all checks and the real models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import Run, read
from quadriga.errors import Problem, UserError
from quadriga.models.registry import catalogue

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of a configuration mean the folder that a run is started from: here an empty one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write() -> Write:
    """Writes a TOML file into the current folder; its path, relative."""

    def write_file(text: str, name: str = "run.toml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def read_config() -> Callable[..., Run]:
    """`read` with the real models and backends; a Path among the arguments is the configuration file."""

    def read_arguments(
        *arguments: str | Path, ranks: int | None = 1, training: bool = True, environ: Mapping[str, str] | None = None
    ) -> Run:
        argv = [
            part
            for argument in arguments
            for part in (["--job.config_file", str(argument)] if isinstance(argument, Path) else [argument])
        ]
        return read(argv, environ or {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=training)

    return read_arguments


@pytest.fixture
def refusal(read_config: Callable[..., Run]) -> Callable[..., tuple[Problem, ...]]:
    """The problems of a configuration that is refused."""

    def problems(*arguments: str | Path, **options: object) -> tuple[Problem, ...]:
        with pytest.raises(UserError) as caught:
            read_config(*arguments, **options)
        return caught.value.problems

    return problems
