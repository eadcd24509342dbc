"""Names of files as text, unique and safe to show; they never become paths on disk."""

import re
import unicodedata
from collections import Counter
from pathlib import PurePosixPath

SYSTEM_FILE = re.compile(
    r"(^|/)(\.+[^./][^/]*|__macosx|thumbs\.db|desktop\.ini|lost\+found|\$recycle\.bin|"
    r"system volume information)(/|$)",
    re.IGNORECASE,
)
JOINERS = "\u200c\u200d\u00ad"  # within emoji and words; harmless though invisible


def decoded(name: bytes) -> str:
    """A name that is UTF-8, or else bytes of some older encoding, none of which is lost."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("latin-1")


def shown(name: str) -> str:
    """A name fit for a terminal, a log, a table: control characters come out as escapes."""
    if name.isascii() and name.isprintable():
        return name
    return "".join(
        letter
        if letter in JOINERS or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else letter.encode("unicode_escape").decode("ascii")
        for letter in name
    )


def is_system_file(name: str) -> bool:
    """Whether an operating system left this file, or a dot hides it or a folder above it."""
    return SYSTEM_FILE.search(name) is not None


class UniqueNames:
    """Names as they come; one that was taken gets a number, `a.png` => `a (2).png`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._times: Counter[str] = Counter()

    def take(self, name: str) -> str:
        """The name if it is free, else the first free one with a number."""
        name = free = name or "unnamed"
        while free in self._taken:
            self._times[name] += 1
            path = PurePosixPath(name)
            end = path.suffix if path.suffix and name.endswith(path.suffix) else ""
            free = f"{name.removesuffix(end)} ({self._times[name] + 1}){end}"
        self._taken.add(free)
        return free
