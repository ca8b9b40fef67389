"""The network interface on which ranks of a machine listen: the loopback, unless the user sets another. No torch."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_ADDRESS = "127.0.0.1"
IFF_LOOPBACK = 0x8  # linux/if.h

# The variables that select the interface of gloo, of NCCL, and of NVSHMEM's bootstrap. Without them gloo resolves this
# machine's own name, which fails in many containers and laptops. NCCL and NVSHMEM would use the first interface that is
# up, except the loopback.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME")


def loopback_variables(environ: Mapping[str, str], machines: int = 1) -> dict[str, str]:
    """The variables that bind the listening sockets of ranks to the loopback, without those that the user set. Empty
    for several machines."""
    name = loopback_interface() if machines == 1 else None
    return {} if name is None else {variable: name for variable in INTERFACE_VARIABLES if not environ.get(variable)}


def format_ports(environ: Mapping[str, str], machines: int) -> str:
    """The interfaces on which a launched run listens, as text for the dry run and the log."""
    if machines > 1:
        return f"the {machines} machines listen on all interfaces: their network must be closed (docs/operations.md)"
    added = loopback_variables(environ)
    users = {name: environ[name] for name in INTERFACE_VARIABLES if environ.get(name)}
    parts = [f"the store on {LOOPBACK_ADDRESS}"]
    parts += [f"{' = '.join([*added, next(iter(added.values()))])}"] if added else []
    parts += [f"{name} = {value}, as you set it" for name, value in users.items()]
    if not added and not users:
        parts.append("no loopback interface was found: gloo, NCCL and NVSHMEM choose theirs")
    return "; ".join(parts)


def loopback_interface() -> str | None:
    """The name of the loopback interface (`lo` on Linux, `lo0` on macOS); None if there is none."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if _is_loopback(name)), None)


def _is_loopback(name: str) -> bool:
    try:
        return bool(int(Path("/sys/class/net", name, "flags").read_text(), 16) & IFF_LOOPBACK)
    except (OSError, ValueError):  # not Linux, or a container without /sys
        return name in ("lo", "lo0")
