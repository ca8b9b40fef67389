"""What a rank prints before its header: a line before the import of torch, which takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import raises ModuleNotFoundError
from quadriga.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_first_line_comes_before_torch_is_imported(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "--job.config_file", "configs/debug/debug.toml"]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, f"--job.dump_folder={tmp_path}"], cwd=root, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "loading PyTorch"
    assert any("torch" in line for line in lines[1:])
