"""The services of infra/compose.yaml as processes on the loopback interface, without containers."""

import re
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ruamel.yaml import YAML

INFRA = Path(__file__).parent.parent / "infra"
SERVICES = YAML(typ="safe").load((INFRA / "compose.yaml").read_text())["services"]


def command_of(service: str, replace: Mapping[str, str]) -> list[str]:
    """A service's command with addresses replaced; each must occur."""
    words: list[str] = SERVICES[service]["command"]
    for old, new in replace.items():
        assert any(old in word for word in words), f"{old} is not in {words}"
        words = [word.replace(old, new) for word in words]
    return words


def environment_of(service: str, secrets: Mapping[str, str]) -> dict[str, str]:
    """A service's environment with its secrets filled in."""
    values: dict[str, str] = SERVICES[service]["environment"]
    return {
        name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: secrets[match[1]], value)
        for name, value in values.items()
    }


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Ask again and again; an OSError counts as no."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what}: not within {seconds} s")
