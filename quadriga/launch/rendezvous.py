"""The rendezvous of the ranks of one machine: a store on the loopback, which the agent creates at each start of the
ranks.

torchrun's own rendezvous listens on all interfaces, without authentication, and its c10d backend unpickles values of
its store. One machine needs neither. There is only one agent, so it keeps its state in memory, and it never reads the
store of the ranks. That store is a TCPStore whose socket is bound to 127.0.0.1 before torch receives it.
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
    """Register the backend with torchrun, under the name that the launcher passes. Call once, in the agent."""
    rendezvous_handler_registry.register(LOOPBACK_RENDEZVOUS, LoopbackRendezvous)


def loopback_store() -> TCPStore:
    """A store that listens on a free port of the loopback interface only, as long as the object exists."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((LOOPBACK_ADDRESS, 0))
        port = listener.getsockname()[1]
        store = TCPStore(
            LOOPBACK_ADDRESS, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.fileno()
        )
        listener.detach()  # the store closes it
        return store


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent. Each start of its ranks gets a new store on a new port."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        if parameters.max_nodes != 1:
            raise ValueError(f"{LOOPBACK_RENDEZVOUS} is for one machine, not for {parameters.max_nodes}")
        self._run_id = parameters.run_id
        self._agent_store: Store = HashStore()
        self._rank_store: TCPStore | None = None

    def get_backend(self) -> str:
        return LOOPBACK_RENDEZVOUS

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks are clients of the agent's store, and no rank creates one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        self._agent_store = HashStore()
        self._rank_store = loopback_store()  # the old store closes, so values of dead ranks are lost
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
