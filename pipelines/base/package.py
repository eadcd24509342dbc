"""A model's folder that says what it holds and who vouches for it.

    SHA256SUMS        every other file with its hash, as `sha256sum -c` reads it
    SHA256SUMS.sig    an Ed25519 signature of that list, and the key it was made with

With `AEGAN_TRUSTED_KEYS` set, a folder that is unsigned, or not exactly what was signed, is refused
before any weight in it is parsed.
"""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from aegan.files import new_file, sha256_of, write_text
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.names import shown
from pipelines.base.outside import check_names

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
SIGNING_KEY, TRUSTED_KEYS = "AEGAN_SIGNING_KEY", "AEGAN_TRUSTED_KEYS"
CONTEXT = b"aegan model package 1\n"  # a signature made for something else is none of a package
LINE = re.compile(r"([0-9a-f]{64})  ([^\\]+)")
MAX_LIST_BYTES, MAX_FILES, MAX_KEY_BYTES = 2**20, 1000, 2**14

TrustedKeys = Mapping[str, "Ed25519PublicKey"]  # by their fingerprints


class Signature(NamedTuple):
    key: str  # fingerprint
    value: bytes


def trusted_keys() -> TrustedKeys:
    """The public keys of `AEGAN_TRUSTED_KEYS`, a file or a folder of *.pub; empty where it is not
    set.

    Raises UserError.
    """
    if TRUSTED_KEYS not in os.environ:
        return {}
    place = Path(os.environ[TRUSTED_KEYS])
    files = sorted(place.glob("*.pub")) if place.is_dir() else [place]
    keys = [_public_key(file) for file in files]
    if not keys:
        raise UserError(f"{TRUSTED_KEYS} is {place}: no file *.pub is there; unset it to trust all")
    return {fingerprint(key): key for key in keys}


def signing_key() -> "Ed25519PrivateKey | None":
    """The private key in the file that `AEGAN_SIGNING_KEY` names, if it does; raises UserError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not os.environ.get(SIGNING_KEY):
        return None
    file = Path(os.environ[SIGNING_KEY])
    content = _read_key(file)
    if file.stat().st_mode & 0o077:
        raise UserError(f"{file}: others may read this private key: chmod 600 {file}")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{file} is no private key as `aegan keygen FILE` makes it")
    return key


def make_keys(file: Path) -> str:
    """Write a new private key to a file and its public key beside it; returns the fingerprint.

    A file that is there is never replaced: UserError.
    """
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, public = Ed25519PrivateKey.generate(), file.with_name(f"{file.name}.pub")
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    if public.exists():
        raise UserError(f"{public} exists: choose another name")
    with clear_disk_errors(file):
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise UserError(f"{file} exists: choose another name") from None
        except FileNotFoundError:
            raise UserError(f"{file.parent}: there is no such folder") from None
        with os.fdopen(descriptor, "wb") as content:
            content.write(private)
        public.write_bytes(
            key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        )
    return fingerprint(key.public_key())


def fingerprint(key: "Ed25519PublicKey") -> str:
    """A public key in 64 hexadecimal digits, which Ed25519's raw form has."""
    return key.public_bytes_raw().hex()


def write_sums(folder: Path) -> None:
    """List all files of a folder in its SHA256SUMS; raises UserError for what is no plain file."""
    names = sorted(_files(folder))
    check_names(names, origin=str(folder))
    with clear_disk_errors(folder):
        write_text(folder / SUMS, "".join(f"{sha256_of(folder / n)}  {n}\n" for n in names))


def sign(folder: Path, key: "Ed25519PrivateKey") -> None:
    """Sign a folder, which must be what its SHA256SUMS says; one without gets it.

    Raises UserError.
    """
    if (folder / SUMS).exists():
        check_files(folder)
    else:
        write_sums(folder)
    value = key.sign(CONTEXT + (folder / SUMS).read_bytes())
    signature = {
        "key": fingerprint(key.public_key()),
        "signature": base64.b64encode(value).decode(),
    }
    with clear_disk_errors(folder), new_file(folder / SIGNATURE) as temporary:
        temporary.write_text(json.dumps(signature) + "\n", encoding="utf-8")


@contextmanager
def trusted(folder: Path) -> Iterator[Path]:
    """The folder of a model as it may be loaded; raises UserError.

    With trusted keys a copy of it that was checked, which nobody changes meanwhile.
    """
    keys = trusted_keys()
    if not keys:
        yield folder
        return
    check_signature(folder, keys)
    with TemporaryDirectory() as copies:
        copy = Path(copies) / (folder.resolve().name or "model")
        try:
            shutil.copytree(folder, copy, symlinks=True)
        except (OSError, shutil.Error) as error:
            raise UserError(f"{folder} cannot be read: {str(error)[:200]}") from None
        check(copy, keys, called=str(folder))
        yield copy


def check(folder: Path, keys: TrustedKeys, *, called: str = "") -> str:
    """Refuse a folder that is not exactly what the holder of a trusted key signed: UserError.

    Returns the key's fingerprint. `called` is the folder's name in messages.
    """
    called = called or str(folder)
    key = check_signature(folder, keys, called=called)
    check_files(folder, called=called)
    return key


def check_signature(folder: Path, keys: TrustedKeys, *, called: str = "") -> str:
    """Refuse a list of files that no holder of a trusted key signed; returns the fingerprint."""
    from cryptography.exceptions import InvalidSignature

    called = called or str(folder)
    signature = read_signature(folder, called=called)
    if signature is None:
        raise UserError(
            f"{called} is not signed, and {TRUSTED_KEYS} is set: have it signed (`aegan sign`), or "
            "unset the variable to trust it"
        )
    if signature.key not in keys:
        raise UserError(
            f"{called} is signed with the key {signature.key[:16]}, which is none of "
            f"{TRUSTED_KEYS}: find out whose it is before you add it"
        )
    try:
        keys[signature.key].verify(
            signature.value, CONTEXT + _read(folder / SUMS, MAX_LIST_BYTES, called)
        )
    except InvalidSignature:
        raise UserError(
            f"{called}: the signature is not of this {SUMS}: it was altered, or the signature is "
            "another model's; fetch the model again from who signed it"
        ) from None
    return signature.key


def read_signature(folder: Path, *, called: str = "") -> Signature | None:
    """What SHA256SUMS.sig says, which proves nothing yet; None without one. Raises UserError."""
    called = called or str(folder)
    if not _holds(folder, SIGNATURE, called):
        return None
    content = _read(folder / SIGNATURE, MAX_KEY_BYTES, called)
    try:
        fields = json.loads(content)
        key, value = fields["key"], base64.b64decode(fields["signature"], validate=True)
        if re.fullmatch("[0-9a-f]{64}", key) and len(value) == 64:
            return Signature(key, value)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{called}: its {SIGNATURE} is no signature; fetch the model again")


def check_files(folder: Path, *, called: str = "") -> None:
    """Refuse a folder whose files are not exactly those of its SHA256SUMS: UserError."""
    called = called or str(folder)
    sums, found = read_sums(folder, called=called), _files(folder, called=called)
    cure = "fetch the model again from where it came"
    for name in sorted(found ^ sums.keys()):
        what = f"which its {SUMS} does not list" if name in found else "missing"
        raise UserError(f"{called}: {shown(name)}, {what}; {cure}")
    for name, recorded in sums.items():
        if sha256_of(folder / name) != recorded:
            raise UserError(
                f"{called}: {shown(name)} was altered: its hash is not in {SUMS}; {cure}"
            )


def read_sums(folder: Path, *, called: str = "") -> dict[str, str]:
    """The hash of each file by its name, plain names only; raises UserError."""
    called = called or str(folder)
    if not _holds(folder, SUMS, called):
        raise UserError(
            f"{called} has no {SUMS}: an older version registered it, or something else wrote it"
        )
    text = _read(folder / SUMS, MAX_LIST_BYTES, called).decode("utf-8", errors="replace")
    lines = [LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if not 0 < len(lines) <= MAX_FILES or not text.endswith("\n") or None in lines:
        raise UserError(f"{called}: its {SUMS} is no list of hashes; fetch the model again")
    pairs = [(line[2], line[1]) for line in lines if line]
    check_names((name for name, _ in pairs), origin=f"{called}/{SUMS}")
    return dict(pairs)


def _files(folder: Path, *, called: str = "") -> set[str]:
    """Names of all files below a folder but for list and signature; raises UserError for links."""
    names = set()
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if not S_ISREG(mode) and not S_ISDIR(mode):
            raise UserError(
                f"{called or folder}: {shown(name)} is a link or no file: put the file itself there"
            )
        if S_ISREG(mode) and name not in (SUMS, SIGNATURE):
            names.add(name)
    return names


def _holds(folder: Path, name: str, called: str) -> bool:
    """Whether something of that name is in a folder, which must exist: UserError."""
    if not folder.is_dir():
        raise UserError(f"{called}: there is no such folder")
    return os.path.lexists(folder / name)


def _read(file: Path, max_bytes: int, called: str) -> bytes:
    """A small plain file; raises UserError."""
    try:
        if S_ISREG(file.lstat().st_mode) and file.stat().st_size <= max_bytes:
            return file.read_bytes()
        reason = "no plain file, or too large"
    except OSError as error:
        reason = error.strerror or "unknown reason"
    raise UserError(f"{called}: {file.name} cannot be used: {reason}; fetch the model again")


def _read_key(file: Path) -> bytes:
    try:
        with file.open("rb") as content:
            return content.read(MAX_KEY_BYTES)
    except OSError as error:
        raise UserError(f"the key {file} cannot be read: {error.strerror}") from None


def _public_key(file: Path) -> "Ed25519PublicKey":
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(file))
    except ValueError:
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{file}, of {TRUSTED_KEYS}, is no public key as `aegan keygen` makes it")
    return key
