"""A model in a process of its own, which the gate starts: it must load and answer without network.

    python pipelines/registry/fresh_process.py FOLDER

Runs by its path, needs `aegan` alone. What Python does with sockets is refused: this shows that a
model needs no network, it is no prison for code, and none of a model's is run.
"""

import sys
from typing import Any

NETWORK = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")


def main(folder: str) -> None:
    sys.addaudithook(_refuse_network)
    import aegan
    from aegan import operations

    try:
        aegan.load(folder, weights="raw", discriminators=True)
        model = aegan.load(folder)
        # The example that a version is registered with (pipelines/registry/registration.py).
        row = {"latent": [0.0] * model.latent_dim}
        [record] = operations.operate(model, [row], {"operation": "generate"})
    except (aegan.ModelError, operations.RequestError, OSError) as error:
        sys.exit(str(error))
    if not record["image"]:
        sys.exit("it answered its example without an image")


def _refuse_network(event: str, _: tuple[Any, ...]) -> None:
    if event in NETWORK:
        raise PermissionError(f"it asked for the network ({event})")


if __name__ == "__main__":
    main(sys.argv[1])
