"""Where the ranks of one machine meet: a store on the loopback, made anew by the agent at each start of the ranks.

torchrun's own rendezvous listens on all interfaces, without authentication, and its c10d backend unpickles what it
finds in its store. One machine needs neither: the agent has nobody to meet, so it keeps its notes in memory, and never
reads the store of the ranks. That store is a TCPStore whose socket was bound to 127.0.0.1 before torch got it.
"""

from __future__ import annotations

import socket

from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from quadriga.comm.network import LOOPBACK_ADDRESS
from quadriga.launch.environment import LOOPBACK_RENDEZVOUS


def register() -> None:
    """Let torchrun know the backend, by the name that the launcher gives it. Call once in the agent."""
    rendezvous_handler_registry.register(LOOPBACK_RENDEZVOUS, LoopbackRendezvous)


def loopback_store() -> TCPStore:
    """A store that listens on a free port of the loopback, and on nothing else, as long as the object lives."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK_ADDRESS, 0))
        port = listener.getsockname()[1]
        store = TCPStore(
            LOOPBACK_ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno()
        )
        listener.detach()  # the store closes it
        return store


class LoopbackRendezvous(RendezvousHandler):
    """One agent, which is all there is: each start of its ranks gets a store of its own, on a port of its own."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes != 1:
            raise ValueError(f"{LOOPBACK_RENDEZVOUS} is for one machine, and {parameters.max_nodes} are to meet")
        self._run_id = parameters.run_id
        self._agent_store: Store = HashStore()
        self._rank_store: TCPStore | None = None

    def get_backend(self) -> str:
        return LOOPBACK_RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        """The ranks are clients of the store; no rank makes one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._agent_store = HashStore()
        self._rank_store = loopback_store()  # the one before closes: what dead ranks left there misleads nobody
        return RendezvousInfo(self._agent_store, 0, 1, RendezvousStoreInfo(LOOPBACK_ADDRESS, self._rank_store.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._rank_store = None
        return True
