"""`python -m pipelines.jobs.with_parent MODULE ...`: a module that ends with who started it.

However that was: the other end of our standard input is the parent's, which the operating system
closes also after `kill -9`. All in our process group then get a Ctrl-C, so that a training saves
its checkpoint, and are killed if they do not end by that. The parent gives us a group of our own.
"""

import os
import runpy
import signal
import sys
import threading
import time

END_SECONDS = 120.0  # for a training that is told to end to save its checkpoint


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written
    os.killpg(0, signal.SIGINT)
    time.sleep(END_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    pipe = os.dup(0)  # which those that we start do not have
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with, args=(pipe,), name="parent", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
