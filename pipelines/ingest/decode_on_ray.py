"""First pass of `preprocess` for a snapshot that is only a listing: Ray Data fetches and decodes.

A task takes one piece, reads its objects from the bucket and sends the decoded rows back. The
driver writes the same part files as `decode.py` would, in whatever order the pieces come.
"""

import logging
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import PIL
import pyarrow as pa
import pyarrow.parquet as pq

from aegan.config import PreprocessConfig
from pipelines.base.errors import UserError
from pipelines.bucket import storage
from pipelines.cluster.session import ray_session, shipped_environment, show_ray_logs
from pipelines.ingest.pieces import Piece, decode_rows
from pipelines.ingest.shards import write_parquet

LOST_TASKS = 5  # tries of a piece whose node or process is lost; by default Ray never ends


def decode_pieces(config: PreprocessConfig, pieces: list[Piece]) -> Iterator[int]:
    """Write the part of each piece; yields after each how many of its files were known: none.

    Which file it is would only be known once it is fetched. Raises UserError.
    """
    with ray_session(gpus=False):
        import ray.data
        import ray.exceptions

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        if not show_ray_logs():
            logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the error says it
        # A block is a piece, and the result one row, which Ray Data neither joins nor splits.
        listings = ray.data.from_arrow([_listing(*numbered) for numbered in enumerate(pieces)])
        with warnings.catch_warnings():
            # Ray Data has no other way yet to end: by itself it tries a lost task for ever.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            parts = listings.map_batches(
                _decode_piece,
                batch_size=None,
                batch_format="pyarrow",
                fn_args=(config, PIL.__version__),
                num_cpus=1,
                max_retries=LOST_TASKS,
                runtime_env={"env_vars": shipped_environment()},
            )
        try:
            for batch in parts.iter_batches(batch_size=None, batch_format="pyarrow"):
                for number, part, problem in zip(*batch.columns, strict=True):
                    if problem.as_py():
                        raise UserError(problem.as_py())
                    table = pa.ipc.open_stream(part.as_buffer()).read_all()
                    write_parquet(iter([table]), pieces[number.as_py()].part, checksums=True)
                    yield 0
        except ray.exceptions.RayError as error:  # after some more tries, which Ray makes itself
            raise UserError(
                f"decoding on the cluster ended ({str(error).splitlines()[0]}): run the same "
                "command again. If a file crashes the decoder, -S data.in_place=false decodes on "
                "this machine and names it (AEGAN_RAY_LOGS=1 shows all that Ray says)"
            ) from None


def _listing(number: int, piece: Piece) -> pa.Table:
    found = pq.ParquetFile(piece.shard).read_row_group(piece.row_group)
    return found.append_column("piece", pa.array([number] * len(found), pa.int64()))


def _decode_piece(listing: pa.Table, config: PreprocessConfig, pillow: str) -> pa.Table:
    """A task on some node => `piece`, `part` (Arrow's stream of the decoded rows), `error`.

    What a user can cure comes back as a value: Ray would repeat a task that raises, and bury why.
    """
    (number,) = listing.column("piece").unique().to_pylist()
    part, error = pa.BufferOutputStream(), ""
    try:
        if pillow != PIL.__version__:
            raise UserError(
                f"a node of the cluster decodes with Pillow {PIL.__version__}, this machine has "
                f"{pillow}: install the same, or pixels may depend on the node"
            )
        tables = decode_rows(_fetch(listing), config)
        first = next(tables)
        with pa.ipc.new_stream(part, first.schema) as stream:
            for decoded in chain([first], tables):
                stream.write_table(decoded)
    except UserError as problem:
        error = str(problem)
    content = pa.array([part.getvalue().to_pybytes()], pa.large_binary())
    return pa.table({"piece": [number], "part": content, "error": [error]})


def _fetch(listing: pa.Table) -> pa.Table:
    """The same files as rows of a snapshot that holds them: `source`, `content`."""
    urls, etags, sizes = (listing.column(name).to_pylist() for name in ("url", "etag", "bytes"))
    with ThreadPoolExecutor(storage.PARALLEL_READS) as pool:
        contents = pa.array(pool.map(_read, urls, etags, sizes), pa.large_binary())
    return pa.table({"source": listing.column("source"), "content": contents})


def _read(url: str, etag: str, size: int) -> bytes:
    """One object as it was when it was listed."""
    try:
        content = storage.retry(lambda: storage.read_object(url, etag=etag))
    except storage.StorageError as error:
        if error.code not in (storage.CHANGED, "NoSuchKey"):
            raise
    else:
        if len(content) == size:
            return content
    raise UserError(f"{url} is not the object that was listed: run `make refresh`")
