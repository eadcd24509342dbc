"""`aegan explore` and `aegan export`: a model at any address => a page, ONNX files."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    with TemporaryDirectory() as networks, _folder_of(address) as folder:
        model = load_model(folder)
        write_page(model, folder, export_onnx(model, Path(networks)), file)


def export(address: str, output: Path) -> list[Path]:
    """Write the networks of a model as ONNX files into a folder; raises UserError."""
    with _folder_of(address) as folder, clear_disk_errors(output):
        return list(export_onnx(load_model(folder), output).values())


@contextmanager
def _folder_of(address: str) -> Iterator[Path]:
    """The model at `models:/...` or in a folder, as a folder on this machine."""
    if not tracking.is_address(address):
        yield Path(address)
        return
    with TemporaryDirectory() as downloads:
        yield tracking.fetch_model(address, Path(downloads))
