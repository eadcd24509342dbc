"""`aegan encode s3://...` with a cluster: its nodes read and decode, with the same latents."""

from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest

from pipelines.serving import batch, decoding, served
from tests.pictures import blocks, encode
from tests.trained import write_model

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.slow]


def rows(out: Path) -> dict[str, list[float] | str]:
    table = pq.read_table(out / "latents").to_pylist()
    return {row["source"]: row["latent"] or row["reason"] for row in table}


def test_a_bucket_s_images_are_decoded_on_the_cluster_with_the_same_result(
    bucket: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=s3)
    files = {f"{row:04d}.png": encode(image) for row, image in enumerate(blocks(40))}
    files |= {"text.png": b"no image", "below/x.zip": b"not read"}
    for name, content in files.items():
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"faces/{name}", Body=content)
    model = served.load(str(write_model(tmp_path / "model")))
    batch.run("encode", f"{bucket}/faces", tmp_path / "here", model)
    monkeypatch.setattr(decoding, "LISTED_ROWS", 8)
    monkeypatch.setattr(batch, "has_cluster", lambda: True)  # a private Ray of this machine
    batch.run("encode", f"{bucket}/faces", tmp_path / "cluster", model)
    here, there = rows(tmp_path / "here"), rows(tmp_path / "cluster")
    assert len(there) == 42
    assert here.keys() == there.keys()
    for source, found in here.items():
        expected = there[source]
        assert found == (expected if isinstance(found, str) else pytest.approx(expected, abs=1e-5))
