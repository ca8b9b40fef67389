"""`python -m quadriga.cli`, where the console script is not installed."""

from __future__ import annotations

import sys

from quadriga.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
