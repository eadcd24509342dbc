"""onnxruntime-web, which runs networks in a browser: two files, fetched once and known by hash.

No package of PyPI holds them. They come out of the npm registry's archive, which needs no node, and
are kept in the environment (`.venv`), not in the project: the larger one has 14 MB.
"""

import logging
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from aegan.files import new_file, sha256_of
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.ingest.https import fetch

VERSION = "1.30.0"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-{VERSION}.tgz"
ARCHIVE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
FILES = {  # in the page => name in the archive's folder package/dist, hash
    "bundle": (
        "ort.wasm.bundle.min.mjs",
        "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ),
    "wasm": (
        "ort-wasm-simd-threaded.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
FOLDER = Path(sys.prefix) / f"onnxruntime-web-{VERSION}"

log = logging.getLogger(__name__)


def read_runtime() -> dict[str, bytes]:
    """The files by their names in the page, fetched if they are not there; raises UserError."""
    if not all(_is_whole(FOLDER / file, expected) for file, expected in FILES.values()):
        _fetch()
    return {name: (FOLDER / file).read_bytes() for name, (file, _) in FILES.items()}


def _is_whole(file: Path, expected: str) -> bool:
    return file.is_file() and sha256_of(file) == expected


def _fetch() -> None:
    log.info("fetching onnxruntime-web %s (33 MB, once) for the explorer", VERSION)
    with TemporaryDirectory() as downloads:
        archive = Path(downloads) / "onnxruntime-web.tgz"
        try:
            fetch(ADDRESS, archive)
        except UserError as error:
            raise UserError(
                f"the explorer's page needs onnxruntime-web {VERSION}, once, and {error}"
            ) from None
        if (found := sha256_of(archive)) != ARCHIVE_SHA256:
            raise UserError(
                f"{ADDRESS} has the SHA-256 {found}, expected {ARCHIVE_SHA256}: something on the "
                "way or the registry changes files; try another network"
            )
        with clear_disk_errors(FOLDER), tarfile.open(archive) as packed:
            for file, _ in FILES.values():
                content = packed.extractfile(f"package/dist/{file}")
                assert content is not None
                with new_file(FOLDER / file) as temporary:
                    temporary.write_bytes(content.read())
