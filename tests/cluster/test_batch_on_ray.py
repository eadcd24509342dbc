"""`aegan encode s3://...` with a cluster: its nodes read and decode, with the same latents."""

import subprocess
import sys
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from pipelines.serving import batch, served
from tests.pictures import blocks, encode
from tests.trained import write_model

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.slow]

# In a process of its own, since a session of Ray begins before Ray is imported.
ON_RAY = """
import sys
from pathlib import Path
from pipelines.serving import batch, decoding, served
decoding.LISTED_ROWS = 8
batch.has_cluster = lambda: True  # a private Ray of this machine
source, out, model = sys.argv[1:]
batch.run("encode", source, Path(out), served.load(model))
"""


def rows(out: Path) -> dict[str, list[float] | str]:
    table = pq.read_table(out / "latents").to_pylist()
    return {row["source"]: row["latent"] or row["reason"] for row in table}


def test_a_bucket_s_images_are_decoded_on_the_cluster_with_the_same_result(
    bucket: str, s3: str, tmp_path: Path
) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3)
    files = {f"{row:04d}.png": encode(image) for row, image in enumerate(blocks(40))}
    files |= {"text.png": b"no image", "below/x.zip": b"not read"}
    for name, content in files.items():
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"faces/{name}", Body=content)
    model = served.load(str(write_model(tmp_path / "model")))
    batch.run("encode", f"{bucket}/faces", tmp_path / "here", model)
    subprocess.run(
        [sys.executable, "-c", ON_RAY, f"{bucket}/faces", tmp_path / "cluster", tmp_path / "model"],
        check=True,
    )
    here, there = rows(tmp_path / "here"), rows(tmp_path / "cluster")
    assert len(there) == 42
    assert here.keys() == there.keys()
    for source, found in here.items():
        expected = there[source]
        assert found == (expected if isinstance(found, str) else pytest.approx(expected, abs=1e-5))
