"""Films: read back, they hold the frames that went in, there and back, at the right moments."""

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

import aegan
from aegan.pictures import PAUSE_MILLISECONDS

GRAYS = (0, 60, 120, 180, 240)
ORDER = [0, 1, 2, 3, 4, 3, 2, 1]  # there and back


def film(*, side: int = 32, channels: int = 3) -> np.ndarray:
    """Frames of one gray each: what compression leaves as it is."""
    return np.stack([np.full((side, side, channels), gray, np.uint8) for gray in GRAYS])


@pytest.mark.parametrize("kind", ["gif", "webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_loop_holds_every_frame_and_plays_for_ever(tmp_path, kind, channels):
    file = tmp_path / f"film.{kind}"
    aegan.save_animation(film(channels=channels), file, frames_per_second=10)
    with Image.open(file) as found:
        assert found.info["loop"] == 0
        values, pauses = [], []
        for frame in ImageSequence.Iterator(found):
            frame.load()
            pauses.append(frame.info["duration"])
            values.append(np.asarray(frame.convert("RGB")))
    assert len(values) == len(ORDER)
    for value, index in zip(values, ORDER, strict=True):
        assert abs(value.astype(int) - GRAYS[index]).max() <= 2
    rest = PAUSE_MILLISECONDS
    assert pauses == [rest, 100, 100, 100, rest, 100, 100, 100]


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (33, 1)])
def test_a_video_holds_every_frame_at_its_moment(tmp_path, side, channels):
    file = tmp_path / "film.mp4"
    aegan.save_animation(film(side=side, channels=channels), file, frames_per_second=10)
    with av.open(file) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert [(frame.width, frame.height) for frame in frames] == [(32, 32)] * 9
    for frame, index in zip(frames, [*ORDER, 0], strict=True):
        assert abs(frame.to_ndarray(format="rgb24").astype(int) - GRAYS[index]).max() <= 4
    starts = [float(frame.time) for frame in frames]
    assert starts == pytest.approx([0, 0.6, 0.7, 0.8, 0.9, 1.5, 1.6, 1.7, 1.8], abs=0.002)


def test_a_film_that_cannot_be_written_leaves_nothing(tmp_path):
    file = tmp_path / "film.mp4"
    with pytest.raises(ValueError, match=r"ends in .webp or .gif or .mp4"):
        aegan.save_animation(film(), tmp_path / "film.avi", frames_per_second=10)
    with pytest.raises(ValueError, match="sides of 2 pixels"):
        aegan.save_animation(film(side=1), file, frames_per_second=10)
    assert list(tmp_path.iterdir()) == []
