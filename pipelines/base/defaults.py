"""Defaults of options that a command's help shows, apart from the slow modules that use them."""

HOST, PORT = "127.0.0.1", 5001  # of `aegan serve`
DAYS = 14  # that a run which nothing names is kept by `aegan clean`
