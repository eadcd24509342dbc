"""Class folders: which part of a file's path says what the image shows."""

from collections.abc import Sequence
from itertools import takewhile

SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def folder_classes(folders: Sequence[str], *, images: int) -> list[str | None]:
    """The class that each of the folders of a set of `images` stands for; all None without classes.

    The first folder that not all share is the class. Folders that say how others split the set
    (`train/cats`), and a copy of the set within itself (`set/set/cats`), are looked through. One
    folder makes no classes, nor does a folder for nearly every image.
    """
    paths = [[name for name in folder.split("/") if name] for folder in folders]
    ends = zip(min(paths), max(paths), strict=False)  # what these share, all between them share
    shared = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], ends)]
    ignored = SPLIT_FOLDERS | {folder.lower() for folder in shared[-1:]}
    classes = [
        next((folder for folder in path[len(shared) :] if folder.lower() not in ignored), None)
        for path in paths
    ]
    names = set(classes) - {None}
    return classes if 2 <= len(names) <= images / 2 else [None] * len(classes)
