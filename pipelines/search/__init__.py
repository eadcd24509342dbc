"""Ray Tune and Optuna: trials, the search over them, its plots."""
