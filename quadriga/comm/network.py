"""Which network interface the ranks of one machine listen on: the loopback, unless the user names another. No torch."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_ADDRESS = "127.0.0.1"
IFF_LOOPBACK = 0x8  # linux/if.h

# What tells a library its interface: the connections of gloo, of NCCL, and of NVSHMEM's start. Gloo would otherwise
# look up this machine's own name, which many containers and laptops cannot resolve; NCCL and NVSHMEM would take the
# first interface that is up, and leave out the loopback.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME")


def loopback_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that keep the listening sockets of ranks on the loopback, without those that the user set."""
    name = loopback_interface()
    return {} if name is None else {variable: name for variable in INTERFACE_VARIABLES if not environ.get(variable)}


def format_ports(environ: Mapping[str, str], machines: int) -> str:
    """Where a run that the launcher starts listens, for the dry run and the log."""
    if machines > 1:
        return f"the {machines} machines listen on all interfaces: their network must be closed (docs/operations.md)"
    ours = loopback_variables(environ)
    users = {name: environ[name] for name in INTERFACE_VARIABLES if environ.get(name)}
    parts = [f"the store on {LOOPBACK_ADDRESS}"]
    parts += [f"{' = '.join([*ours, next(iter(ours.values()))])}"] if ours else []
    parts += [f"{name} = {value}, as you set it" for name, value in users.items()]
    if not ours and not users:
        parts.append("no loopback interface was found: gloo, NCCL and NVSHMEM choose theirs")
    return "; ".join(parts)


def loopback_interface() -> str | None:
    """The name of the loopback interface (`lo` on Linux, `lo0` on macOS); None where there is none."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if _is_loopback(name)), None)


def _is_loopback(name: str) -> bool:
    try:
        return bool(int(Path("/sys/class/net", name, "flags").read_text(), 16) & IFF_LOOPBACK)
    except (OSError, ValueError):  # no Linux, or no /sys in this container
        return name in ("lo", "lo0")
