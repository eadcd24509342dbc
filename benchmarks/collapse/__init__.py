"""Mode collapse and known manifolds: the arms of the objective on the protocols of the field.

    .venv/bin/python -m benchmarks.collapse grid --arm gan aegan --loss bce --seeds 10 --json FILE

Tasks: ring, grid, 1200d, weak-discriminator, mnist, stacked-mnist, faces, manifold, lines. One
entry a seed, and a summary. The losses are those of `aegan.losses`; data, networks and metrics
follow the protocols that docs/science.md names.
"""
