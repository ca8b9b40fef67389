"""`python -m quadriga.cli`, for use without the installed console script."""

from __future__ import annotations

import sys

from quadriga.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
