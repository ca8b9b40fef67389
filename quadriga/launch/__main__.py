"""`python -m quadriga.launch`: check the run at the door, then train on all ranks of this machine."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - said before an older Python meets what it cannot read
    sys.exit(f"quadriga: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")

import os

from quadriga.launch.supervisor import main

sys.exit(main(sys.argv[1:], os.environ))
