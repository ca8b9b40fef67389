"""The sound inputs of the analysis readers are read, so that a fuzz case differs from something that works."""

from __future__ import annotations

import pytest
from readers_analysis import READERS


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_sound_input_is_read(reader, tmp_path, capsys):
    reader.build(tmp_path)
    assert reader.read(tmp_path) == 0, capsys.readouterr().err
