"""What the stages write where, and that nothing else is ever removed from there.

DVC deletes a stage's outputs before the stage runs, and a stage replaces its folders as a whole. So
whatever lies in such a folder and is none of the files named here is the user's, and stops both.
"""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from aegan.training.run_folder import NAMES
from pipelines.base.errors import UserError
from pipelines.base.names import shown

RAW, SHARDS = Path("artifacts/raw"), Path("artifacts/shards")
# No output, so that DVC leaves it alone: the last snapshot, from which the next one takes what has
# not changed. (`persist: true` would keep the output, but bypass DVC's run cache.)
LAST_RAW = Path("artifacts/.last-raw")
PREPROCESS, TRAIN = Path("artifacts/preprocess"), Path("artifacts/train")
INTERPOLATE, EXPLORE = Path("artifacts/interpolate"), Path("artifacts/explore")
TUNE = Path("artifacts/tune")
# No output, but the user's: images that versions are compared on (pipelines/registry/reference.py).
REFERENCE, REFERENCE_DVC = Path("reference"), Path("reference.dvc")
PICTURES = ("real_to_real", "mirror", "random", "reconstructions", "samples", "fitted_samples")
WEIGHTS = ("weights", "ema", "latents", "discriminators")
NETWORKS = ("generator", "encoder", "image_discriminator", "latent_discriminator")
PLOTS = ("slices", "parallel_coordinates", "importance")
FOLDERS: dict[Path, tuple[str, ...]] = {  # folder that is replaced => what a stage writes there
    RAW: ("manifest.json", "files-[0-9]*.parquet", "objects-[0-9]*.parquet"),
    SHARDS: ("manifest.json", *(f"{s}-[0-9]*.parquet" for s in ("train", "validation", "test"))),
    PREPROCESS: ("quarantine.csv", "statistics.json", "contact_sheet.png"),
    TRAIN: (
        *(str(NAMES.facts), "metrics.json", "curves.csv", str(NAMES.samples / "step-[0-9]*.png")),
        "model/config.json",
        *(f"model/{name}.safetensors" for name in WEIGHTS),
    ),
    INTERPOLATE: (
        "index.json",
        *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "webp")),
    ),
    EXPLORE: ("explorer.html", *(f"{name}.onnx" for name in NETWORKS)),
    TUNE: ("tuned.yaml", "comparison.json", "trials.csv", *(f"{name}.png" for name in PLOTS)),
}
TEMPORARY = (".*.tmp", ".*.tmp/*", "*/.*.tmp", "*/.*.tmp/*")  # ours, of a process that was killed
SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")  # what a file manager leaves
SHOWN = 5  # names in a message


def check_folders() -> None:
    """UserError if there is a file of the user's in any folder that DVC or a stage replaces."""
    for folder, written in FOLDERS.items():
        check_folder(folder, written)


def check_folder(folder: Path, written: Sequence[str]) -> None:
    """UserError that names the files in a folder that no pattern of `written` fits."""
    found = sorted(find_foreign(folder, written))
    if found:
        raise UserError(
            f"{folder} is an output, which every run replaces, but holds files of yours: "
            f"{listed(found)}; move them to a place of their own (data/, say)"
        )


def find_foreign(folder: Path, written: Sequence[str]) -> Iterator[str]:
    """Names below a folder, links included, that none of the patterns fits."""
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in (*files, *links):
            inside = (Path(where) / name).relative_to(folder).as_posix()
            if name not in SYSTEM and not fits(inside, (*written, *TEMPORARY)):
                yield inside


def is_written(name: str) -> bool:
    """Whether a stage writes a file of this name into one of its folders."""
    return any(
        fits(name.removeprefix(f"{folder}/"), written)
        for folder, written in FOLDERS.items()
        if name.startswith(f"{folder}/")
    )


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of the patterns fits; `*` stands for slashes too."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def listed(names: Sequence[str]) -> str:
    """The first few of many names, fit for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + more
