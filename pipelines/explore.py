"""Stage `explore`: the trained model for other programs and for people (docs/explorer.md).

`artifacts/explore` holds its networks, four or what the arm has, as ONNX files and `explorer.html`,
one file in which anyone walks between pictures in a browser. Where what runs the networks there
cannot be fetched, the stage says so and leaves the page out.
"""

import logging
from pathlib import Path

from aegan.onnx_export import absent, export_onnx
from pipelines.base import locks
from pipelines.base.errors import UserError, run_stage
from pipelines.base.files import new_folder
from pipelines.base.outputs import EXPLORE, FOLDERS, TRAIN
from pipelines.base.trained_model import load_model
from pipelines.serving.explorer import write_page

MODEL = TRAIN / "model"
PAGE = "explorer.html"
LATER = "`.venv/bin/dvc repro --force --single-item explore`"  # the stage itself has ended well

log = logging.getLogger(__name__)


def explore(model_folder: Path, output: Path) -> None:
    """Replace the folder `output` by a model's networks and page; raises UserError."""
    model = load_model(model_folder, discriminators=True)
    with new_folder(output, written=FOLDERS[EXPLORE]) as temporary:
        networks = export_onnx(model, temporary)
        if without := absent(networks):
            log.info("ONNX: %s", without)
        try:
            write_page(model, model_folder, networks, temporary / PAGE)
        except UserError as error:
            log.warning("warning: no %s: %s (%s makes it then)", PAGE, error, LATER)


def main() -> None:
    with locks.hold("explore"):
        explore(MODEL, EXPLORE)
    if (EXPLORE / PAGE).exists():
        log.info("explorer: %s", (EXPLORE / PAGE).resolve())


if __name__ == "__main__":
    run_stage(main)
