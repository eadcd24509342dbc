"""The only kagglehub: data sets of Kaggle."""

import re
from pathlib import Path

from pipelines.base.errors import UserError


def fetch(handle: str) -> Path:
    """The folder of a Kaggle data set, from kagglehub's cache or from Kaggle."""
    if not re.fullmatch(r"[\w-]+/[\w-]+(/versions/\d+)?", handle, re.ASCII):
        raise UserError(f"kaggle:{handle} is no data set: expected kaggle:owner/name")
    import kagglehub  # slow to import, needed by this source alone

    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # kagglehub documents no error types of its own
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"kaggle:{handle} cannot be fetched ({cause}): check the name and the network; "
            "a private set needs KAGGLE_USERNAME and KAGGLE_KEY"
        ) from None
