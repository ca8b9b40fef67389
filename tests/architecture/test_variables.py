"""The table of environment variables lists what the code and `run_train.sh` read."""

from __future__ import annotations

import re

from tree import PACKAGE, ROOT

from quadriga.config.variables import LAUNCH_VARIABLES, VARIABLES, variables_help

READ = re.compile(r"""environ(?:\.get\(|\.pop\(|\[|, )"([A-Z_]+)\"""")
# Set by torchrun, by a shell, or by Quadriga for other programs.
NOT_OF_THE_USER = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HOME"}
NOT_OF_THE_USER |= {"NO_COLOR", "PYTHONPATH", "KINETO_LOG_LEVEL", "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"}


def test_every_variable_that_the_code_reads_is_listed():
    code = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    read = {name for name in READ.findall(code) if not name.startswith(("TORCHELASTIC_", "TORCH_NCCL_"))}
    assert {"NGPU", "LOG_RANK", "DRY_RUN"} <= read <= {name for name, *_ in VARIABLES} | NOT_OF_THE_USER


def test_the_script_and_the_help_explain_the_variables_of_a_launch():
    script = (ROOT / "run_train.sh").read_text(encoding="utf-8")
    for name, *_ in LAUNCH_VARIABLES:
        assert re.search(rf"(?m)^# .*\b{name}\b", script), name
        assert re.search(rf"(?m)^  {name} +\S", variables_help()), name
