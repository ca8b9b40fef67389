"""`python -m quadriga.launch`: check the run before the launch, then train on all ranks of this machine."""

import importlib.util
import os
import sys


def refuse(what: str) -> None:
    """Say what keeps this interpreter from running the launcher at all, and leave as for any mistake of the user."""
    print(f"quadriga: {what}", file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):  # noqa: UP036 - printed before an older Python meets what it cannot read
    refuse(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
if importlib.util.find_spec("pydantic") is None:
    refuse(f"what it needs is not installed for {sys.executable}: pip install -r requirements.txt")

from quadriga.launch.supervisor import main  # noqa: E402

sys.exit(main(sys.argv[1:], os.environ))
