"""Which code decides a result: the modules of ours that one imports, and a hash of what they say.

The hash is the same on every Python; layout, comments and docstrings do not count.
"""

import ast
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # of the packages
NOT_IN_WEIGHTS = {  # what training imports, but no weight depends on, and why
    "aegan": "names of other modules, which count themselves",
    "aegan.arguments": "what is refused",
    "aegan.config": "types of the parameters, which count themselves",
    "aegan.metrics.diagnosis": "when a training is ended that leads nowhere",
    "aegan.metrics.diversity": "by what that is noticed",
    "aegan.files": "how a file comes into its place",
    "aegan.latent_density": "what random latents are drawn of once the weights are trained",
    "aegan.model_folder": "how finished weights are written, and read to start from",
    "aegan.pictures": "how images are laid out and saved",
    "aegan.training.run_folder": "names of files",
    "aegan.data.node_memory": "whose memory holds the images",
    "aegan.data.image_files": "aegan.sampling reads files with it; training has shards",
}


@cache
def weights_code_sha256() -> str:
    """Of the code that decides the weights of a training, as it was when first asked for."""
    modules = ["aegan.training.loop", "aegan.training.start"]
    return code_sha256(code_of(modules, without=NOT_IN_WEIGHTS))


def code_sha256(files: Iterable[Path]) -> str:
    """Of what files of code say."""
    said = [_plain(_without_docstrings(_tree(file))) for file in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def code_of(modules: Collection[str], *, without: Collection[str] = ()) -> list[Path]:
    """The files of these modules and of all of ours that they import, directly or through others.

    Those of `without`, and what only they import, are left out.
    """
    found: set[str] = set()
    new = set(modules)
    while new:
        found |= new
        new = {name for module in new for name in _imports(module)} - found - set(without)
    return sorted(file for name in found if (file := file_of(name)) is not None)


def file_of(module: str) -> Path | None:
    """The file of one of our modules, `aegan.losses`; None for any other name."""
    path = ROOT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


def _imports(module: str) -> Iterator[str]:
    """The modules of ours that one imports, also inside functions.

    Of `from aegan import losses` that is `aegan.losses`, of `from aegan import load` it is `aegan`.
    """
    file = file_of(module)
    for node in ast.walk(_tree(file)) if file else ():
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if file_of(name) else node.module for name in within]
        else:
            continue
        yield from (name for name in names if file_of(name))


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())), *rest]:
                    node.body = rest
    return tree


def _plain(node: Any) -> Any:
    """A syntax tree as lists and strings, without empty fields, which Pythons add or leave out."""
    if isinstance(node, ast.AST):
        fields = ((name, _plain(value)) for name, value in ast.iter_fields(node))
        return [type(node).__name__, *([name, value] for name, value in fields if value)]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return None if node is None else repr(node)
