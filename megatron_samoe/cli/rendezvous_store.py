"""Holds the store of torchrun's rendezvous, so that a job survives the loss of any of its hosts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from megatron_samoe.cli.program import program
from megatron_samoe.errors import CommunicationError, ConfigError


@dataclass(frozen=True, kw_only=True)
class RendezvousStore:
    """Holds the store of torchrun's rendezvous, so that a job survives the loss of any of its hosts.

    `megatron-samoe rendezvous-store --port 29400` on a host that does not train, such as a login node; then on every node
    `torchrun --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-conf is_host=0 ...`. Without it the store lives in the
    agent of the host that --rdzv-endpoint names, and the job ends with that host. See docs/cluster.md.
    """

    port: int = 29400
    """where agents find the store"""
    host: str = "0.0.0.0"
    """address to listen on"""

    def run(self) -> None:
        """Keeps the store until it is interrupted."""
        if not 0 < self.port < 2**16:
            raise ConfigError("--port", self.port, "must be from 1 to 65535")
        from megatron_samoe.parallel_state.rank_store import serve_store

        try:
            store = serve_store(self.host, self.port, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
            raise CommunicationError(f"port {self.port} of {self.host} cannot be listened on: {problem}") from None
        print(f"agents can meet at port {store.port}; Ctrl-C ends the store, and with it the job", flush=True)
        while True:
            time.sleep(3600)


main = program(RendezvousStore)

if __name__ == "__main__":
    sys.exit(main())
