"""`aegan explore` and `aegan export`: a model at any address => a page, ONNX files."""

from pathlib import Path
from tempfile import TemporaryDirectory

from aegan.onnx_export import export_onnx
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.trained_model import load_model
from pipelines.registry import tracking
from pipelines.serving.explorer import write_page


def explore(address: str, file: Path) -> None:
    """Write the explorer's page of a model; raises UserError."""
    if file.suffix != ".html":
        raise UserError(f"--out is {file}: expected a name that ends in .html")
    with (
        TemporaryDirectory() as networks,
        tracking.local_folder(address or tracking.default_model()) as folder,
    ):
        model = load_model(folder)
        write_page(model, folder, export_onnx(model, Path(networks)), file)


def export(address: str, output: Path) -> list[Path]:
    """Write the networks of a model as ONNX files into a folder; raises UserError."""
    with (
        tracking.local_folder(address or tracking.default_model()) as folder,
        clear_disk_errors(output),
    ):
        return list(export_onnx(load_model(folder), output).values())
