"""An internet of its own, in which every redirect to a dangerous place is tried.

Run in a network namespace (`unshare --net --mount`), where any address can be ours. Prints JSON:
for each route its outcome, and which hosts were asked for something.
"""

import json
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any
from urllib.parse import unquote

from pipelines.base.errors import UserError

PUBLIC, OTHER_PUBLIC, PRIVATE, OTHER_PRIVATE = "8.8.4.4", "9.9.9.9", "10.1.2.3", "10.1.2.4"
METADATA, METADATA_6 = "169.254.169.254", "fd00:ec2::254"
HOSTS = {  # what a name server answers
    "public": PUBLIC,
    "other-public": OTHER_PUBLIC,
    "private": PRIVATE,
    "other-private": OTHER_PRIVATE,
    "to-loopback": "127.0.0.1",
    "to-loopback-6": "::1",
    "to-metadata": METADATA,
    "to-metadata-6": METADATA_6,
}
REFUSED = (  # from a public address
    *("https://127.0.0.1", "https://localhost", "http://127.0.0.1", "http://localhost"),
    *("https://127.1", "https://2130706433", "https://0", "https://0.0.0.0"),
    *(
        "https://[::1]",
        "https://[::ffff:127.0.0.1]",
        "https://to-loopback",
        "https://to-loopback-6",
    ),
    *("https://169.254.169.254", "https://2852039166", "https://[::ffff:169.254.169.254]"),
    *("https://[fd00:ec2::254]", "https://to-metadata", "https://to-metadata-6"),
    *("https://10.1.2.3", "https://private"),
)
ROUTES = {  # named by the user => where it leads, and whether that is followed
    **{("https://public", place): False for place in REFUSED},
    ("https://public", "https://other-public"): True,
    ("https://private", "https://other-private"): True,
    ("https://private", "https://other-public"): True,
    ("https://private", "https://to-loopback"): False,
    ("https://private", "https://to-metadata-6"): False,
    ("http://127.0.0.1", "http://localhost"): True,
    ("http://127.0.0.1", "https://public"): True,
    ("http://127.0.0.1", "https://private"): False,
    ("http://127.0.0.1", "https://to-metadata"): False,
}


class Handler(BaseHTTPRequestHandler):
    """Leads from /?place to the place's /set.zip, and has that everywhere."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        place = unquote(self.path.partition("?")[2])
        if place:
            self.send_response(302)
            self.send_header("Location", f"{place}/set.zip")
        else:
            Handler.asked.append(self.headers["Host"])
            self.send_response(200)
        self.send_header("Content-Length", "0" if place else "6")
        self.end_headers()
        self.wfile.write(b"" if place else b"secret")

    def log_message(self, *_: object) -> None:
        pass


class Server6(ThreadingHTTPServer):
    address_family = AF_INET6


def set_up(folder: Path) -> None:
    """All addresses on this machine, but reached as if they were elsewhere; names; servers."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("link", "set", "lo", "up")
    ip("addr", "add", "192.168.9.9/32", "dev", "lo")
    for address in (PUBLIC, OTHER_PUBLIC, PRIVATE, OTHER_PRIVATE, METADATA):
        ip("addr", "add", f"{address}/32", "dev", "lo")
        route = ["local", address, "dev", "lo", "src", "192.168.9.9", "table", "local"]
        ip("route", "replace", *route)
    ip("-6", "addr", "add", f"{METADATA_6}/128", "dev", "lo", "nodad")
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in HOSTS.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate", folder / "key")
    for kind, address in (
        (ThreadingHTTPServer, "0.0.0.0"),
        (Server6, "::1"),
        (Server6, METADATA_6),
    ):
        for port in (80, 443):
            server: Any = kind((address, port), Handler)
            if port == 443:
                server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()


def names() -> str:
    """Whom the certificate is for: everybody, so that nothing but our check refuses."""
    addresses = {"127.0.0.1", "::1", "0.0.0.0", *HOSTS.values()}
    hosts = {"localhost", "127.1", "2130706433", "2852039166", "0", *HOSTS}
    return ",".join([f"DNS:{name}" for name in hosts] + [f"IP:{ip}" for ip in addresses])


def main(folder: Path) -> None:
    set_up(folder)
    from pipelines.ingest.https import fetch  # urllib3 looks at once whether there is IPv6

    ended = []
    for (start, place), is_followed in ROUTES.items():
        Handler.asked.clear()
        try:
            fetch(f"{start}/?{place}", folder / "file")
            result = "followed"
        except UserError as error:
            result = str(error)
        ended.append((start, place, is_followed, result, list(Handler.asked)))
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
