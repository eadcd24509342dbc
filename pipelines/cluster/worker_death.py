"""Why workers of a training died, in our words: Ray's own are sixty lines."""

import re

CURE = (
    "lower training.batch_size, or set compute.micro_batch_size for the same batch in smaller "
    "pieces, training.reader: streamed to keep the images on disk, or take a machine with more "
    "memory; the same command goes on from the last checkpoint"
)
LOW_MEMORY = re.compile(
    r"running low on memory\..*?was ([\d.]+GB) used / ([\d.]+GB) limit", re.DOTALL
)
KILLED = re.compile(r"SIGKILL|OOM killer|connection error code 2", re.IGNORECASE)


def explain(error: BaseException) -> str:
    """One sentence with the cure for a death that has one; else what Ray says."""
    text = str(error)
    if found := LOW_MEMORY.search(text):
        used, limit = found.groups()
        return (
            f"the machine ran out of memory ({used} of {limit} used), so Ray ended a worker: {CURE}"
        )
    if KILLED.search(text):
        return (
            "a worker's process was killed from outside, as the system does where memory runs out "
            f"(`dmesg` says so): {CURE}"
        )
    return f"{text or type(error).__name__} (AEGAN_RAY_LOGS=1 shows all that Ray says)"
