"""`python -m quadriga.launch`: check the run, then train on all ranks of this machine."""

import importlib.util
import os
import sys


def refuse(what: str) -> None:
    """Print why this interpreter cannot run the launcher, and exit with the code of a user's error."""
    print(f"quadriga: {what}", file=sys.stderr)
    sys.exit(2)


if sys.version_info < (3, 11):  # noqa: UP036 - printed before an older Python reads syntax that it does not know
    refuse(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")
if importlib.util.find_spec("pydantic") is None:
    refuse(f"required packages are not installed for {sys.executable}: pip install -r requirements.txt")

from quadriga.launch.supervisor import main  # noqa: E402

sys.exit(main(sys.argv[1:], os.environ))
