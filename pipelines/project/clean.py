"""`make clean`: remove the files that runs have written, by name, and nothing else.

Needs no package, so that it also works without `.venv`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from aegan.training import run_folder
from pipelines.base import locks, outputs
from pipelines.base.errors import run_stage

WRITTEN = outputs.FOLDERS | {  # folder => what runs write there; `*` crosses folders
    Path("artifacts/evaluate"): ("metrics.json", "summary.json", "latent.png"),
    Path("artifacts/register"): ("registration.json",),
    Path("artifacts/gate"): ("index.html", "comparison.json", "*.safetensors"),
    outputs.LAST_RAW: outputs.FOLDERS[outputs.RAW],
    locks.LOCKS: ("*",),
    Path("report"): ("index.html",),
    Path("tune"): ("dvc.lock",),
    Path(): ("dvc.lock",),
    Path("runs"): (
        *("*.lock", "compiled/*", "preprocess-*/part-*.parquet", "preprocess-*/thumbnails"),
        *("tune-*/search/*", *(f"*/{pattern}" for pattern in run_folder.WRITTEN)),
    ),
}


def main() -> None:
    with locks.hold(locks.PIPELINE):
        locks.check_stages()
        for folder, written in WRITTEN.items():
            removed = sorted(_remove(folder, written))
            if removed:
                print(f"removed from {folder}: {outputs.listed(removed)}")
    for folder in (Path("artifacts"), Path("report"), Path("runs")):
        remove_empty_folders(folder)
        kept = sorted(outputs.find_foreign(folder, ()))
        if kept:
            print(f"kept in {folder}, for no run has written it: {outputs.listed(kept)}")


def _remove(folder: Path, written: tuple[str, ...]) -> Iterator[str]:
    """Delete the files that fit a pattern; yields their names."""
    alone = folder in (Path(), Path("tune"))  # the project's own folders: nothing below them
    for path in list(folder.glob("*" if alone else "**/*")):
        name = path.relative_to(folder).as_posix()
        patterns = written if alone else (*written, *outputs.TEMPORARY)
        if path.is_file() and outputs.fits(name, patterns):
            path.unlink()
            yield name


def remove_empty_folders(folder: Path) -> None:
    """Bottom up; links to folders stay."""
    for where, _, _ in os.walk(folder, topdown=False):
        if not Path(where).is_symlink() and not any(Path(where).iterdir()):
            Path(where).rmdir()


if __name__ == "__main__":
    run_stage(main)
