"""`python -m pipelines.params presets/NAME.yaml` writes an overlay's values into params.yaml."""

import sys
from pathlib import Path

from pipelines.base import locks
from pipelines.base.errors import UserError, run_stage
from pipelines.base.params import apply_overlay


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m pipelines.params presets/NAME.yaml")
    with locks.hold(locks.PIPELINE):  # a run at work reads params.yaml stage by stage
        changed = apply_overlay(Path(sys.argv[1]))
    print("\n".join(changed) or "nothing to change")


if __name__ == "__main__":
    run_stage(main)
