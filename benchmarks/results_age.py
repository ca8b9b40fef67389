"""Lists the results that are older than the code that they measure.

    python benchmarks/results_age.py            # exit code 1 if any is

A result has the hashes of the folders that its script measures (`common.MEASURES`). If one of them has changed, the
figures may have changed too. Results without hashes are compared by their commit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, git, measured_folders, text_table


def script_of(result: dict[str, Any]) -> str:
    words = result["command"].split()
    return Path(words[1]).stem if len(words) > 1 else result["benchmark"]


def changed_since(result: dict[str, Any]) -> list[str]:
    """The measured folders that have changed since the result; `["?"]` if this is not known."""
    now = measured_folders(script_of(result))
    then = result.get("measures") or measured_folders(script_of(result), result["versions"]["commit"].rstrip("+"))
    if not all(then.values()):
        return ["?"]
    return [folder for folder in now if then.get(folder) != now[folder]]


def main() -> int:
    rows, old = [], 0
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        changed = changed_since(result)
        old += bool(changed)
        commit = result["versions"]["commit"]
        dirty = "; not from a clean commit" if commit.endswith("+") else ""
        rows.append([path.stem, commit, result["date"][:10], (", ".join(changed) or "as measured") + dirty])
    print(text_table(["result", "commit", "date", "changed since"], rows))
    head = git("rev-parse", "--short", "HEAD")
    print(f"\n{old} of {len(rows)} results are older than the code they measure (HEAD {head})")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
