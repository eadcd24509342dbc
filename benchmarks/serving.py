"""What one request of `aegan serve` may cost, and its speed beside `mlflow models serve`.

.venv/bin/python -m benchmarks.serving costs    # the costliest pictures, as many as are allowed
.venv/bin/python -m benchmarks.serving speed    # artifacts/train/model behind both servers
.venv/bin/python -m benchmarks.serving load     # the same with 1, 8 and 64 clients at once
.venv/bin/python -m benchmarks.serving endure   # 10,000 requests, a tenth of them malformed
.venv/bin/python -m benchmarks.serving batch    # `aegan encode` of a folder of photographs
"""

import argparse
import base64
import http.client
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import psutil
import requests
import torch
from PIL import Image

import aegan
from aegan import operations
from pipelines.base.errors import run_stage
from pipelines.serving import batch, endpoint, served
from tests.aegan.test_colour import press_profile
from tests.pictures import chunk, encode, png

MODEL, BIN = Path("artifacts/train/model"), Path(sys.executable).parent
TIMES = 40
CLIENTS, ROUNDS, LOAD_REQUESTS = (1, 8, 64), 3, 200  # requests of a round, for each server
ENDURED, PARTS = 10_000, 10
BATCH_FILES = 2048
WIDE, THIN = (4096, 4096), (64, 65_500)  # of equal use: a thin picture is not shrunk before colours


class Server(NamedTuple):
    """A server on this machine."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def processes(self) -> list[psutil.Process]:
        """Its own and those that it has started."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    @property
    def mebibytes(self) -> float:
        """That it holds in memory now."""
        return sum(process.memory_info().rss for process in self.processes) / 2**20

    @property
    def processor_seconds(self) -> float:
        """That it has taken so far: what a busy machine does not change much."""
        times = [process.cpu_times() for process in self.processes]
        return sum(time_.user + time_.system for time_ in times)


def noise(size: tuple[int, int], *, channels: int = 3) -> Image.Image:
    """A picture that no encoder makes small."""
    shape = (size[1], size[0], channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mode = {1: "L", 3: "RGB", 4: "CMYK"}[channels]
    return Image.frombytes(mode, size, pixels.tobytes())


def of_many_scans(side: int, scans: int) -> bytes:
    """A small JPEG whose scans each cost a walk over all its blocks."""
    content = encode(Image.new("L", (side, side), 100), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * scans + content[-2:]


def of_texts(texts: int) -> bytes:
    """A small PNG whose texts unpack to 1 MiB each."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes((1 << 20) - 1)))
    return png(np.zeros((16, 16, 3), np.uint8), text * texts)


COSTLY: dict[str, Callable[[], bytes]] = {
    "JPEG of 100 scans": lambda: of_many_scans(1024, 90),
    "the same without end": lambda: of_many_scans(1024, 90)[:-2],
    "progressive JPEG": lambda: of_many_scans(4096, 0),
    "thin JPEG": lambda: encode(Image.new("RGB", THIN, (9, 99, 200)), "JPEG"),
    "thin CMYK JPEG": lambda: encode(Image.new("CMYK", THIN, (9, 99, 200, 4)), "JPEG"),
    "thin CMYK JPEG, profile": lambda: encode(
        Image.new("CMYK", THIN, (9, 99, 200, 4)), "JPEG", icc_profile=press_profile()
    ),
    "thin PNG of gamma 1": lambda: png(
        np.full((THIN[1], THIN[0], 3), 77, np.uint8), chunk(b"gAMA", (100_000).to_bytes(4, "big"))
    ),
    "thin PNG, transparent": lambda: encode(Image.new("RGBA", THIN, (9, 9, 9, 99)), "PNG"),
    "16-bit PNG": lambda: png(
        np.zeros((THIN[1], THIN[0], 3), np.uint16), chunk(b"tRNS", bytes(6)), depth=16
    ),
    "PNG of texts": lambda: of_texts(60),
    "PNG": lambda: encode(Image.new("RGB", WIDE), "PNG"),
    "WebP": lambda: encode(noise((2048, 2048)), "WEBP", quality=60, method=0),
    "AVIF": lambda: encode(noise((2048, 2048)), "AVIF", quality=30, speed=10),
    "JPEG 2000": lambda: encode(
        noise((2048, 2048)), "JPEG2000", quality_mode="rates", quality_layers=[24]
    ),
    "TIFF": lambda: encode(Image.new("RGB", WIDE), "TIFF", compression="tiff_adobe_deflate"),
    "TIFF of JPEG": lambda: encode(Image.new("RGB", (512, 512)), "TIFF", compression="jpeg"),
    "PPM of 9 bits": lambda: b"P6\n512 512\n300\n" + bytes(512 * 512 * 6),
    "plain PPM": lambda: b"P3\n512 512\n255\n" + b"9 " * (512 * 512 * 3),
    "GIF": lambda: encode(Image.new("RGB", WIDE), "GIF"),
}


def cost(
    content: bytes, folder: Path, results: "multiprocessing.Queue[tuple[int, float, float]]"
) -> None:
    """Rows, seconds and further MiB of the largest request of one picture that is answered."""
    model = aegan.load(folder)
    image = base64.b64encode(content).decode()
    ask(model, [base64.b64encode(encode(Image.new("RGB", (9, 9)))).decode()])
    work = operations.work_of(content, enough=operations.MAX_WORK)
    rows = min(
        operations.MAX_ROWS,
        operations.MAX_WORK // work,
        endpoint.MAX_BODY_BYTES // (len(image) + 20),
    )
    before = peak_mebibytes()
    started = time.perf_counter()
    ask(model, [image] * rows)
    results.put((rows, time.perf_counter() - started, peak_mebibytes() - before))


def ask(model: aegan.Model, images: list[str]) -> None:
    """Encode pictures, as a request would."""
    operations.operate(model, [{"image": image} for image in images], {"operation": "encode"})


def batch_work(folder: Path) -> None:
    """Files a second of `aegan encode`, beside the encoder and the decoder alone, in turns."""
    served_ = served.load(str(folder))
    model = served_.model
    torch.set_num_threads(1)
    size = (512, 384)
    small = [noise((8, 6)).resize(size, Image.Resampling.BICUBIC).rotate(n) for n in range(16)]
    contents = [encode(image, "JPEG", quality=90) for image in small]
    images = np.stack([model.form.decode(content) for content in contents])
    with TemporaryDirectory() as place:
        pictures = Path(place) / "pictures"
        pictures.mkdir()
        for number in range(BATCH_FILES):
            (pictures / f"{number}.jpg").write_bytes(contents[number % len(contents)])
        for round_ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(BATCH_FILES // 64):
                aegan.encode(model, np.concatenate([images] * 4))
            encoder = BATCH_FILES / (time.perf_counter() - started)
            started = time.perf_counter()
            for content in contents * 8:
                model.form.decode(content)
            decoder = 8 * len(contents) / (time.perf_counter() - started)
            started = time.perf_counter()
            batch.run("encode", str(pictures), Path(place) / f"out-{round_}", served_)
            whole = BATCH_FILES / (time.perf_counter() - started)
            print(
                f"encode {whole:.0f} files/s; the encoder alone {encoder:.0f} images/s, "
                f"decoding alone, on one core, {decoder:.0f}",
                flush=True,
            )


def peak_mebibytes() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def costs(folder: Path) -> None:
    """Each kind in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for name, make in COSTLY.items():
        content, results = make(), context.Queue()
        process = context.Process(target=cost, args=(content, folder, results))
        process.start()
        rows, seconds, mebibytes = results.get(timeout=300)
        process.join()
        print(
            f"{name:24} {len(content) / 1e6:6.2f} MB x {rows:4} rows "
            f"{seconds:6.2f} s {mebibytes:5.0f} MiB",
            flush=True,
        )


@contextmanager
def both_servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Ours and MLflow's with the same model, until the block ends."""
    with TemporaryDirectory() as store:
        theirs = [
            *(str(BIN / "mlflow"), "models", "serve", "-m", save_for_mlflow(folder, Path(store))),
            *("--env-manager", "local", "--host", "127.0.0.1", "--port", "{port}"),
        ]
        with running(serve_command(folder)) as ours, running(theirs) as mlflow:
            yield {"aegan serve": ours, "mlflow models serve": mlflow}


def serve_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.serve", "--model", str(folder), "--port", "{port}"]


def speed(folder: Path) -> None:
    """Requests a second and latency of one caller, both servers at once, asked in turns."""
    with both_servers(folder) as servers:
        addresses = {name: f"{server.url}/invocations" for name, server in servers.items()}
        image = photograph()
        requests_ = {
            "generate 1": ([], {"operation": "generate"}),
            "generate 64": ([], {"operation": "generate", "count": 64}),
            "reconstruct 1": ([{"image": image}], {"operation": "reconstruct"}),
            "reconstruct 64": ([{"image": image}] * 64, {"operation": "reconstruct"}),
        }
        for name, (rows, params) in requests_.items():
            body = {"dataframe_records": rows, "params": params}
            for server, found in in_turns(body, addresses).items():
                print(f"{name:16} {server:20} {described(found, sum(found))}", flush=True)


def photograph() -> str:
    """Base64 of a JPEG of 256x256."""
    return base64.b64encode(encode(noise((256, 256)), "JPEG")).decode()


def described(seconds: list[float], wall: float) -> str:
    """Requests a second and quantiles of the time that each took."""
    quantiles = np.quantile(seconds, (0.5, 0.95, 0.99)) * 1000
    middle, late, last = quantiles
    return f"{len(seconds) / wall:7.1f}/s, {middle:6.1f} ms, 95%: {late:6.1f}, 99%: {last:6.1f}"


def load(folder: Path) -> None:
    """Requests a second and latency of several clients, each server in turn, in rounds."""
    body = json.dumps(
        {"dataframe_records": [{"image": photograph()}], "params": {"operation": "reconstruct"}}
    ).encode()
    with both_servers(folder) as servers:
        for clients in CLIENTS:
            found: dict[str, list[tuple[list[float], float]]] = {name: [] for name in servers}
            work = dict.fromkeys(servers, 0.0)
            for round_ in range(ROUNDS + 1):
                for name, server in servers.items():
                    count = max(clients * 4, LOAD_REQUESTS // (1 if round_ else 4))
                    before = server.processor_seconds
                    answers, wall = ask_at_once(server, [body] * count, clients)
                    work[name] += (
                        (server.processor_seconds - before) / count / ROUNDS * bool(round_)
                    )
                    assert {status for status, _ in answers} == {200}, name
                    if round_:  # the first is a rehearsal
                        found[name].append(([seconds for _, seconds in answers], wall))
            for name, rounds in found.items():
                times = [seconds for round_times, _ in rounds for seconds in round_times]
                rates = [len(round_times) / wall for round_times, wall in rounds]
                print(
                    f"{clients:3} clients {name:20} "
                    f"{described(times, sum(wall for _, wall in rounds))}; "
                    f"rounds {min(rates):.0f} to {max(rates):.0f}/s; "
                    f"{work[name] * 1000:.1f} ms of a processor each, "
                    f"{servers[name].mebibytes:.0f} MiB",
                    flush=True,
                )


def ask_at_once(
    server: Server, bodies: Sequence[bytes], clients: int
) -> tuple[list[tuple[int, float]], float]:
    """Send all bodies over so many connections => (status, seconds) of each; seconds of all."""
    bodies_left, answers = iter(bodies), []
    lock = threading.Lock()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        while True:
            with lock:
                body = next(bodies_left, None)
            if body is None:
                break
            started = time.perf_counter()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            answers.append((response.status, time.perf_counter() - started))
        connection.close()

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.perf_counter() - started


MALFORMED = (
    b"{",
    b'{"dataframe_records": [{"image": "AAAA"}], "params": {"operation": "encode"}}',
    b'{"dataframe_records": [{"latent": [1]}], "params": {"operation": "generate"}}',
    b'{"dataframe_records": [], "params": {"operation": "explode"}}',
)


def endure(folder: Path) -> None:
    """Many requests of 64 clients, a tenth malformed: statuses, times and the server's memory."""
    image = photograph()
    row = {"image": image}
    sound = [
        json.dumps({"dataframe_records": rows, "params": params}).encode()
        for rows, params in (
            ([row], {"operation": "reconstruct"}),
            ([row], {"operation": "encode"}),
            ([], {"operation": "generate", "count": 4}),
            ([row, row], {"operation": "interpolate", "num_frames": 4}),
        )
    ]
    bodies = [
        MALFORMED[number // 10 % len(MALFORMED)] if number % 10 == 9 else sound[number % len(sound)]
        for number in range(ENDURED)
    ]
    with running(serve_command(folder)) as server:
        started, first = time.perf_counter(), server.mebibytes
        for part in range(PARTS):
            share = bodies[part * ENDURED // PARTS : (part + 1) * ENDURED // PARTS]
            answers, wall = ask_at_once(server, share, CLIENTS[-1])
            statuses = Counter(status for status, _ in answers)
            assert statuses == {200: len(share) * 9 // 10, 400: len(share) // 10}, statuses
            times = [seconds for _, seconds in answers]
            print(f"{described(times, wall)}, {server.mebibytes:.0f} MiB", flush=True)
        seconds = time.perf_counter() - started
        print(f"{ENDURED} requests in {seconds:.0f} s, no error; at first {first:.0f} MiB")


def in_turns(body: object, addresses: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each of many requests, by server; one connection for each."""
    times: dict[str, list[float]] = {server: [] for server in addresses}
    sessions = {server: requests.Session() for server in addresses}
    for _ in range(TIMES):
        for server, address in addresses.items():
            started = time.perf_counter()
            sessions[server].post(address, json=body, timeout=60).raise_for_status()
            times[server].append(time.perf_counter() - started)
    return times


def save_for_mlflow(folder: Path, store: Path) -> str:
    """The model as `register` writes it, in a folder."""
    import mlflow

    from pipelines.registry import model_from_code

    path = str(store / "model")
    mlflow.pyfunc.save_model(
        path,
        python_model="pipelines/registry/model_from_code.py",
        artifacts={"model": str(folder)},
        code_paths=["aegan"],
        signature=model_from_code.SIGNATURE,
    )
    return path


@contextmanager
def running(command: list[str]) -> Iterator[Server]:
    """A server's process until the block ends, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    filled = [part.format(port=port) for part in command]
    process = subprocess.Popen(
        filled,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    server = Server(port, process.pid)
    try:
        while True:
            try:
                requests.get(f"{server.url}/ping", timeout=30)
                break
            except requests.ConnectionError:
                if process.poll() is not None:
                    raise
                time.sleep(0.5)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


MEASURES = {"costs": costs, "speed": speed, "load": load, "endure": endure, "batch": batch_work}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("model", type=Path, nargs="?", default=MODEL, help="a model folder")
    options = parser.parse_args()
    MEASURES[options.measure](options.model)


if __name__ == "__main__":
    run_stage(main)
