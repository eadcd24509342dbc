"""`aegan explore` and `aegan export`: a model at any address => a page, ONNX files."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aegan.onnx_export import absent, export_onnx
from pipelines.base.errors import UserError
from pipelines.base.files import clear_disk_errors
from pipelines.base.trained_model import load_model
from pipelines.registry import tracking
from pipelines.serving.explorer import write_page


def explore(address: str, file: Path) -> tuple[str, dict[str, Any]]:
    """Write the explorer's page of a model => what was done; raises UserError."""
    address = address or tracking.default_model()
    if file.suffix != ".html":
        raise UserError(f"--out is {file}: expected a name that ends in .html")
    with (
        TemporaryDirectory() as networks,
        tracking.model_at(address) as folder,
    ):
        model = load_model(folder)
        write_page(model, folder, export_onnx(model, Path(networks)), file)
    return f"file://{file.resolve()}", {"model": address, "out": str(file)}


def export(address: str, output: Path) -> tuple[str, dict[str, Any]]:
    """Write a model's networks as ONNX files into a folder => what was done; raises UserError."""
    address = address or tracking.default_model()
    with (
        tracking.model_at(address) as folder,
        clear_disk_errors(output),
    ):
        files = export_onnx(load_model(folder, discriminators=True), output)
    lines = [str(file) for file in files.values()]
    if without := absent(files):
        lines.append(f"no more: {without}")
    return "\n".join(lines), {"model": address, **{name: str(file) for name, file in files.items()}}
