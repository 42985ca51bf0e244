"""A job of one node meets on the loopback interface: nothing of it listens to the network.

torch's TCPStore listens on every interface whatever address it is given, and takes keys from
whoever connects. Here a server whose address is that of this machine alone gets a socket that
listens there. As a program it is torchrun for one node:

    python -m megatron_dft.compat.loopback --nproc-per-node 8 -m megatron_dft.train …
"""

import contextlib
import socket
import sys
from typing import Any

from megatron_dft.compat import STORES
from megatron_dft.compat.hooks import wrap

_HOSTS = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((address, port))
        server.listen(4096)
    except OSError:
        server.close()
        raise
    return server


_mine: set[int] = set()  # ports on which this process has a store


def _make(original: type) -> type:
    class LoopbackStore(original):  # type: ignore[misc, valid-type]
        """As torch's."""

        def __init__(
            self,
            host_name: str,
            port: int,
            world_size: int | None = None,
            is_master: bool = False,
            *more: Any,
            **named: Any,
        ) -> None:
            if is_master and host_name in _HOSTS and "master_listen_fd" not in named:
                try:
                    server = _listen(_HOSTS[host_name], port)
                except OSError as error:
                    if port not in _mine:
                        raise RuntimeError(f"port {port} on {host_name}: {error}") from None
                    is_master = False  # several stores of a process share one server
                else:
                    port = server.getsockname()[1]
                    _mine.add(port)
                    named["master_listen_fd"] = server.detach()
                    named["multi_tenant"] = False
            super().__init__(host_name, port, world_size, is_master, *more, **named)

    return LoopbackStore


def install() -> None:
    """Change what torch makes its stores of, in this process."""
    for place in STORES:
        wrap(place, _make)


def free_port() -> int:
    """A port on which nothing of this machine listens, nor will for a minute but on purpose.

    A connection that its server ends keeps the port: the system hands it to nobody who asks for any
    port, and whoever names it may listen there (SO_REUSEADDR, which torch sets).
    """
    with _listen("127.0.0.1", 0) as server:
        port = int(server.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            client.recv(1)
    return port


def main() -> None:
    """torchrun for one node, all of it on the loopback interface."""
    import torch.distributed.run

    install()
    with contextlib.suppress(ValueError):
        sys.argv.remove("--standalone")
    torch.distributed.run.main(["--standalone", "--local-addr", "127.0.0.1", *sys.argv[1:]])


if __name__ == "__main__":
    main()
