"""Holds the store at which torchrun's agents meet, so that a job survives the loss of any of its hosts.

`rendezvous_store.py --port 29400` on a host that does not train, such as a login node; then on every node
`torchrun --rdzv-backend c10d --rdzv-endpoint HOST:29400 --rdzv-conf is_host=0 ...`. Without it the store lives in the
agent of the host that --rdzv-endpoint names, and the job ends with that host. See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import sys
import time

from megatron_samoe.cli.arguments import Words, adder


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = adder(parser)
    add("--port", 29400, "where agents find the store")
    add("--host", "0.0.0.0", "address to listen on")
    return parser


def main(words: Words = None) -> int:
    """Keeps the store until it is interrupted; returns 1 where it cannot."""
    parser = make_parser()
    options = parser.parse_args(words)
    if not 0 < options.port < 2**16:
        parser.error(f"--port {options.port} must be from 1 to 65535")
    from torch.distributed import TCPStore

    try:
        store = TCPStore(options.host, options.port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
        print(f"error: port {options.port} cannot be listened on: {problem}", file=sys.stderr)
        return 1
    print(f"agents can meet at port {store.port}; Ctrl-C ends the store, and with it the job", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
