"""Whether the cluster that RAY_ADDRESS names is one that this process can join: known in seconds.

Ray itself asks an address where no cluster is for many minutes, in raw warnings.
"""

import re
from typing import Any

from pipelines.base.errors import UserError
from pipelines.base.names import shown
from pipelines.cluster import ray_private

ANSWER_SECONDS = 15.0  # of the cluster, for one small question
NODE_SECONDS = 10  # until this machine is known to the cluster as one of its nodes
FORM = "RAY_ADDRESS=host:6379 on a node of the cluster (6379 is Ray's port unless it was started "
FORM += (
    "with another one; 8265, the dashboard's, is for `RAY_ADDRESS=http://host:8265 make submit`)"
)
ELSE = ("HTTP/2", "Socket closed", "reset by peer", "Broken pipe")  # gRPC's words for other servers
HOST_AND_PORT = re.compile(r"[^\s/:@]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")


def check(address: str) -> None:
    """Raise a UserError, in less than 30 s, unless Ray can join this cluster from here."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS is {shown(address)}, but training is driven from a node of the cluster: "
            "set host:port there, or submit it with `make submit`"
        )
    if address != "auto" and HOST_AND_PORT.fullmatch(address) is None:
        raise UserError(f"RAY_ADDRESS is {shown(address)}: expected {FORM}, or auto")
    found = _find_here() if address == "auto" else address
    where = "the cluster that RAY_ADDRESS=auto has found, " if address == "auto" else "RAY_ADDRESS="
    _ask(found, f"{where}{shown(found)}", stale=address == "auto")
    _find_node(found, f"{where}{shown(found)}")


def _find_here() -> str:
    """The address of the cluster that was started on this machine last."""
    try:
        return str(ray_private.services().get_ray_address_from_environment("auto", None))
    except ConnectionError:
        raise UserError(
            f"RAY_ADDRESS is auto, but no Ray runs on this machine: start it (`ray start`), or set "
            f"{FORM}; unset, a private Ray is started"
        ) from None


def _ask(address: str, name: str, *, stale: bool) -> None:
    """Ask Ray's control service whether it lives."""
    import grpc

    try:
        ray_private.ask_gcs(address, timeout=ANSWER_SECONDS)
    except grpc.RpcError as error:
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise UserError(
                f"{name} refused this token: RAY_AUTH_MODE and RAY_AUTH_TOKEN must be those of "
                "the cluster"
            ) from None
        cure = "it has ended: start it again (`ray start`), or unset RAY_ADDRESS"
        raise UserError(
            f"no Ray cluster answers at {name} ({_reason(error)}): "
            f"{cure if stale else f'expected {FORM}'}"
        ) from None


def _reason(error: Any) -> str:
    import grpc

    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer in {ANSWER_SECONDS:.0f} s"
    text = " ".join(str(error.details()).split())
    if any(sign in text for sign in ELSE):
        return "something else listens there"
    return shown(text.rpartition(": ")[2][:200])


def _find_node(address: str, name: str) -> None:
    """A driver joins a cluster through the node that it runs on."""
    services = ray_private.services()
    try:
        services.get_node_to_connect_for_driver(
            services.GcsClient(address=address), timeout_seconds=NODE_SECONDS
        )
    except RuntimeError:
        raise UserError(
            f"this machine is no node of {name}: run the same command on one of its nodes, or "
            "`make submit` with the address of its dashboard, RAY_ADDRESS=http://host:8265"
        ) from None
