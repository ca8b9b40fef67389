"""A library that only some data need may be missing. The message names the data and the library."""

from __future__ import annotations

import pytest

from quadriga.config.schema import TextKeys
from quadriga.data import parquet, sources
from quadriga.data.files import File
from quadriga.data.hub import HubSource
from quadriga.errors import UserError


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)


def test_the_hub_needs_datasets() -> None:
    with pytest.raises(UserError, match="a data set on the Hub needs datasets, which is not installed"):
        HubSource("allenai/c4", "en", "train", keys=TextKeys("hub"))


def test_parquet_needs_pyarrow(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and so on PAR1")
    file = File(path, path.name, path.stat().st_size, compressed=False)
    with pytest.raises(UserError, match="a Parquet file needs pyarrow, which is not installed"):
        parquet.ParquetSource([file], TextKeys("parquet"))
