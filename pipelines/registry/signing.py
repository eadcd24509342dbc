"""`aegan verify`, `aegan sign`: whether a model is what was signed, in a folder or in MLflow."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.base import package
from pipelines.base.errors import UserError
from pipelines.registry import tracking


def verify(address: str) -> str:
    """Look at all files of a model; returns what is known of them, raises UserError."""
    keys = package.trusted_keys()
    with TemporaryDirectory() as downloads:
        folder = Path(address)
        if tracking.is_address(address):
            folder = tracking.fetch_package(address, Path(downloads), keys)
        if keys:
            key = package.check(folder, keys, called=address)
            return f"{address}: whole, and signed with the trusted key {key[:16]}"
        package.check_files(folder, called=address)
        signature = package.read_signature(folder, called=address)
    if not signature:
        return f"{address}: whole, not signed"
    return (
        f"{address}: whole; it names the key {signature.key[:16]}, which was not checked: "
        f"{package.TRUSTED_KEYS} is not set"
    )


def sign(address: str) -> tuple[str, dict[str, Any]]:
    """Sign a model, which must be whole => what was done; raises UserError."""
    key = package.signing_key()
    if key is None:
        raise UserError(f"{package.SIGNING_KEY} is not set: the file of `aegan keygen FILE`")
    with TemporaryDirectory() as downloads:
        if tracking.is_address(address):
            address = tracking.pinned(address)
            folder = tracking.fetch_package(address, Path(downloads), {})
            package.sign(folder, key)
            tracking.add_signature(address, folder)
        else:
            package.sign(Path(address), key)
    name = package.fingerprint(key.public_key())
    return f"{address}: signed with the key {name[:16]}", {"model": address, "key": name}
