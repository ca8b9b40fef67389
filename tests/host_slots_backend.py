"""The backend `host-slots`, for tests alone: gloo, and the protocol of NVSHMEM over shared memory of one machine.

Without torch, so that the launcher too can know it: `environ_with_host_slots` registers it in every process of a
launch, `register` in this one.
"""

from __future__ import annotations

from pathlib import Path

from quadriga.comm.backend import DTYPES, register_backend
from quadriga.config.run_spec import BackendFacts

FACTS = BackendFacts("host-slots", "cpu", DTYPES, fallback_backend="gloo", transport="host_slots:HostTransport")
_HOOK = "import sys\nsys.path.append({folder!r})\nimport host_slots_backend\nhost_slots_backend.register()\n"


def register() -> None:
    register_backend(FACTS)


def environ_with_host_slots(folder: Path) -> dict[str, str]:
    """Variables under which every process of a launch knows the backend. `folder`: for the hook."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(folder=str(Path(__file__).parent)))
    return {"PYTHONPATH": str(folder)}
