"""Mode collapse and known manifolds: the arms of the objective on the protocols of the field.

    .venv/bin/python -m benchmarks.collapse ring --json FILE       (also grid, 1200d)
    .venv/bin/python -m benchmarks.collapse weak --json FILE --picture FILE
    .venv/bin/python -m benchmarks.collapse lines --json FILE
    .venv/bin/python -m benchmarks.collapse digits --mnist FOLDER --json FILE

The losses are those of `aegan.losses`; data, networks and metrics follow the protocols that
docs/science.md names.
"""
