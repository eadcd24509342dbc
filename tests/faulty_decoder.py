"""A `sitecustomize.py` that makes pictures of two sizes end the process that decodes them."""

FAULTY_DECODER = """
import ctypes, os, resource, signal
from PIL import PngImagePlugin

def load(self, load=PngImagePlugin.PngImageFile.load):
    if self.size == (17, 19):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        ctypes.string_at(0)  # what no Python error announces
    if self.size == (17, 23):
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
    return load(self)

PngImagePlugin.PngImageFile.load = load
"""
