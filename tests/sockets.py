"""The sockets that processes listen on, as the kernel lists them, a free one, and a client that attacks them."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LISTENING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # the kernel's states: TCP_LISTEN, and for UDP bound
CONNECTIONS = 200
GARBAGE = random.Random(13).randbytes(1024)


@dataclass(frozen=True)
class Listener:
    protocol: str
    address: str
    port: int
    pid: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def listeners(pids: Iterable[int]) -> set[Listener]:
    """What these processes listen on, each seen in its own network namespace; UDP sockets without a peer too."""
    found = set()
    for pid in pids:
        inodes = _sockets(pid)
        for protocol, state in LISTENING.items():
            with suppress(OSError):  # the process has ended
                for line in Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == state and fields[9] in inodes:
                        address, _, port = fields[1].partition(":")
                        found.add(Listener(protocol, _address(address), int(port, 16), pid))
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    found.add(target[len("socket:[") : -1])
    return found


def _address(text: str) -> str:
    """The kernel prints words of 32 bits in the order of the machine, which is little-endian here."""
    words = [bytes.fromhex(text[place : place + 8])[::-1] for place in range(0, len(text), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, b"".join(words))


def free_port() -> int:
    """A port of the loopback that no process holds. The system never gives one of these to a socket that asks for any
    port, so it stays free until the run that is started next takes it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.SystemRandom().sample(range(10_000, first), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


class HostileClient:
    """A client that attacks: for each port 1 kB of garbage, a connection that says nothing, half a number and
    stays, and 200 connections at once. `close` closes those that stay."""

    def __init__(self) -> None:
        self._open: list[socket.socket] = []

    def attack(self, port: int) -> None:
        garbage = self._connect(port)
        if garbage is not None:
            with suppress(OSError):
                garbage.sendall(GARBAGE)
            self._open.append(garbage)
        half = self._connect(port)
        if half is not None:
            with suppress(OSError):
                half.sendall(b"\x01\x00\x00")
            self._open.append(half)
        burst = [self._connect(port) for _ in range(CONNECTIONS)]
        for one in burst:
            if one is not None:
                one.close()

    def close(self) -> None:
        for one in self._open:
            one.close()

    def _connect(self, port: int) -> socket.socket | None:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:  # it listens no more
            return None
