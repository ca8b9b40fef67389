"""The inputs that `readers_hf` damages are sound: a reader that refused them would pass every case."""

from __future__ import annotations

import pytest
import readers_hf
from fuzzing import Reader


@pytest.mark.parametrize("reader", readers_hf.READERS, ids=lambda reader: reader.name)
def test_the_sound_input_is_read(reader: Reader, tmp_path):
    reader.build(tmp_path)
    reader.read(tmp_path)
