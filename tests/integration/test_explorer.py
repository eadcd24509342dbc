"""The explorer's page in Chromium, offline, from a file: what it draws is what torch draws."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page

import aegan
from aegan.config import ModelConfig
from aegan.data.image_files import decode_image
from pipelines.serving import exports
from tests import browser as browsers
from tests.latents import add_density, small_density
from tests.trained import write_model

pytestmark = pytest.mark.integration
STEPS = 64


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_density(write_model(tmp_path_factory.mktemp("explorer") / "model"), small_density(8))


@pytest.fixture(scope="module")
def page(browser: Browser, model_folder: Path) -> Iterator[Page]:
    file = model_folder.parent / "explorer.html"
    exports.explore(str(model_folder), file)
    opened = browsers.open_page(browser, file)
    yield opened
    assert opened.problems == []  # type: ignore[attr-defined]


def picture(*, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth shapes and noise, which shrinking with another filter would show."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 11), np.sin((x + y) / 5), np.cos(x / 90)], -1)
    noise = np.random.default_rng(seed).normal(0, 0.2, waves.shape)
    pixels = np.clip((waves + noise) * 100 + 128, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # a camera held upright
    return encoded(picture(size=(300, 200)), "JPEG", quality=95, exif=exif)


FILES = {  # content, and by how many levels any pixel may differ
    "wide": (encoded(picture(size=(333, 97)), "PNG"), 0),
    "tall": (encoded(picture(size=(97, 333)), "PNG"), 1),  # Pillow then takes the rows first
    "small": (encoded(picture(size=(11, 9)), "PNG"), 0),
    "as it should be": (encoded(picture(size=(16, 16)), "PNG"), 0),
    "large, no multiple of anything": (encoded(picture(size=(1009, 773)), "PNG"), 0),
    "gray": (encoded(picture(size=(200, 120), mode="L"), "PNG"), 0),
    "half transparent": (encoded(picture(size=(200, 120), mode="RGBA"), "PNG"), 1),
    "a small photograph": (encoded(picture(size=(120, 90)), "JPEG", quality=95), 2),
    "a photograph": (encoded(picture(size=(640, 480)), "JPEG", quality=95), 3),
    "a rotated photograph": (rotated(), 3),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("channels", "fit"), [(3, "crop"), (1, "pad")])
def test_a_picture_becomes_the_pixels_that_training_would_have_seen(page, name, channels, fit):
    content, tolerance = FILES[name]
    found = page.evaluate(
        """async ([content, wanted]) => {
          const blob = new Blob([Uint8Array.from(atob(content), letter => letter.charCodeAt())]);
          return [...(await readPicture(blob, wanted)).data];
        }""",
        [base64.b64encode(content).decode(), {"imageSize": 16, "channels": channels, "fit": fit}],
    )
    expected = decode_image(content, image_size=16, image_channels=channels, fit=fit)
    difference = np.abs(np.array(found) - expected.reshape(-1).astype(int))
    assert difference.max() <= tolerance


def pixels(page: Page, canvas: str) -> np.ndarray:
    """What a canvas shows, once nothing waits to be drawn: [H, W, 3]."""
    page.wait_for_selector("body:not([data-drawing])", state="attached")
    data = page.evaluate(
        """id => {
          const canvas = document.getElementById(id);
          return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
        }""",
        canvas,
    )
    side = round((len(data) / 4) ** 0.5)
    return np.array(data).reshape(side, side, 4)[..., :3]


def latent(page: Page) -> torch.Tensor:
    return torch.tensor([json.loads(page.input_value("#numbers"))])


def walk_to(page: Page, step: int) -> None:
    page.evaluate(
        """step => {
          const slider = document.getElementById("walk");
          slider.value = step;
          slider.dispatchEvent(new Event("input"));
        }""",
        step,
    )


def drop(page: Page, card: str, content: bytes) -> None:
    page.evaluate(
        """([card, content]) => {
          const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt());
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([bytes], "mine.png", {type: "image/png"}));
          document.getElementById(card).dispatchEvent(
            new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
        }""",
        [card, base64.b64encode(content).decode()],
    )


def assert_drawn(found: np.ndarray, expected: torch.Tensor) -> None:
    """Within a level: a value just between two of them may be rounded either way."""
    difference = np.abs(found.astype(int) - expected.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("path", ["slerp", "linear"])
def test_two_pictures_of_the_visitors_are_reconstructed_and_walked_between(
    page, model_folder, path
):
    model = aegan.load(model_folder)
    files = [encoded(picture(size=(150, 90), seed=seed), "PNG") for seed in (1, 2)]
    page.select_option("#path", "curved" if path == "slerp" else "straight")
    page.set_input_files(
        "#left-file", {"name": "a.png", "mimeType": "image/png", "buffer": files[0]}
    )
    page.wait_for_selector("#left-original:not([hidden])")
    drop(page, "right-card", files[1])
    page.wait_for_selector("#right-original:not([hidden])")
    images = torch.from_numpy(
        np.stack([decode_image(file, image_size=16, image_channels=3) for file in files])
    )
    start, end = aegan.encode(model, images).split(1)
    for canvas, number in (("left", 0), ("right", 1)):
        assert (pixels(page, f"{canvas}-original") == images[number].numpy()).all()
        assert_drawn(pixels(page, canvas), aegan.reconstruct(model, images)[number])
    frames = aegan.interpolate(model, start, end, num_frames=STEPS + 1, path=path)[0]
    for step in (0, 1, 32, 45, STEPS):
        walk_to(page, step)
        assert_drawn(pixels(page, "current"), frames[step])


def test_a_slider_changes_its_number_and_those_that_change_most_come_first(page, model_folder):
    model = aegan.load(model_folder)
    before = latent(page)
    label = page.inner_text("#sliders label >> nth=0")
    index = int(label.split()[1]) - 1
    page.locator("#sliders input >> nth=0").focus()
    page.keyboard.press("End")
    expected = before.clone()
    expected[0, index] = 3.0
    torch.testing.assert_close(latent(page), expected, rtol=1e-4, atol=1e-5)
    assert_drawn(pixels(page, "current"), aegan.decode(model, latent(page))[0])
    shown = [int(text.split()[1]) - 1 for text in page.locator("#sliders label").all_inner_texts()]
    z = aegan.random_latents(model, 200, seed=3)
    changes = []
    for number in range(8):
        moved = z.clone()
        moved[:, number] += 0.1
        with torch.no_grad():
            changes.append(float((model.generator(moved) - model.generator(z)).square().mean()))
    assert shown[0] in np.argsort(changes)[-3:]
    assert shown[-1] in np.argsort(changes)[:3]


def test_numbers_can_be_pasted_and_others_are_refused(page, model_folder):
    model = aegan.load(model_folder)
    z = aegan.random_latents(model, 1, seed=5, latents="prior")
    page.fill("#numbers", " ".join(f"{value:.5e}" for value in z[0].tolist()))
    page.click("#use")
    assert_drawn(pixels(page, "current"), aegan.decode(model, z)[0])
    page.fill("#numbers", "1, 2, 3")
    page.click("#use")
    assert "3 numbers" in page.inner_text("#status")
    page.fill("#numbers", json.dumps(z[0].tolist()))
    page.click("#use")
    assert page.inner_text("#status") == ""


def test_the_animation_is_the_walk_there_and_back(page):
    pixels(page, "current")
    with page.expect_download() as started:
        page.click("#save-animation")
    with Image.open(started.value.path()) as animation:
        assert animation.format == "PNG"
        assert animation.n_frames == 2 * STEPS
        assert animation.size == (320, 320)
        animation.seek(STEPS)
        last = np.asarray(animation.convert("RGB").resize((16, 16), Image.Resampling.NEAREST))
    walk_to(page, STEPS)
    assert (last == pixels(page, "current")).all()


def test_the_current_picture_is_saved_as_it_is_seen(page):
    shown = pixels(page, "current")
    with page.expect_download() as started:
        page.click("#save")
    with Image.open(started.value.path()) as saved:
        assert (saved.format, saved.size) == ("PNG", (320, 320))
        assert (
            np.asarray(saved.convert("RGB")) == shown.repeat(20, axis=0).repeat(20, axis=1)
        ).all()


def test_a_slow_walk_comes_coarse_to_fine_and_the_step_that_a_finger_rests_on_first(
    browser, page, model_folder
):
    opened = browsers.open_page(browser, model_folder.parent / "explorer.html")
    pixels(opened, "current")
    begun, shows_nearest, after = opened.evaluate(
        """async () => {
          const pause = milliseconds => new Promise(done => setTimeout(done, milliseconds));
          const askAtOnce = ask, order = [];
          ask = async job => { await pause(50); return askAtOnce(job); };
          byId("left-random").click();
          setInterval(() => frames.forEach((frame, step) => {
            if (frame && !order.includes(step)) order.push(step);
          }), 5);
          while (order.length < 9) await pause(5);
          const begun = [...order];
          for (let step = 1; step <= 41; step += 2) {
            byId("walk").value = step;
            byId("walk").dispatchEvent(new Event("input"));
            await pause(10);
          }
          const there = order.length;
          const [red] = byId("current").getContext("2d").getImageData(8, 8, 1, 1).data;
          const showsNearest = red === frames[40][3 * (8 * imageSize + 8)];
          while (!order.includes(41)) await pause(5);
          return [begun, showsNearest, order.slice(there)];
        }"""
    )
    assert begun == [0, 64, 32, 16, 48, 8, 24, 40, 56]
    assert shows_nearest
    assert len(after) <= 2  # one was being drawn
    opened.context.close()


def test_samples_are_like_those_of_the_fitted_latents(page, model_folder):
    density = aegan.load(model_folder).latent_density
    for label, name in enumerate(density.classes):
        page.select_option("#class", str(label))
        drawn = page.evaluate("Array.from({length: 400}, () => [...drawLatent()])")
        z = torch.tensor(drawn)
        expected = density.sample(4000, torch.Generator().manual_seed(0), label=name)
        assert (z.mean(0) - expected.mean(0)).abs().max() < 0.3
        assert (z.T.cov() - expected.T.cov()).abs().max() < 0.6
    page.select_option("#class", "")


def test_a_file_that_is_no_picture_is_refused_in_one_line(page):
    drop(page, "left-card", b"no picture")
    page.wait_for_function("() => byId('status').textContent.includes('cannot read')")
    assert "cannot read mine.png" in page.inner_text("#status")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_can_be_used_by_everyone(browser, page, model_folder, width, scheme):
    file = model_folder.parent / "explorer.html"
    opened = browsers.open_page(browser, file, width=width, scheme=scheme)
    assert browsers.serious_findings(opened) == []
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    opened.context.close()


@pytest.fixture(scope="module")
def phone(browser: Browser, page: Page, model_folder: Path) -> Iterator[Page]:
    """The page on a telephone, where nothing but a finger touches it."""
    file = model_folder.parent / "explorer.html"
    opened = browsers.open_page(browser, file, width=390, phone=True)
    yield opened
    assert opened.problems == []  # type: ignore[attr-defined]
    opened.context.close()


def tap(phone: Page, selector: str) -> None:
    browsers.touch(phone, browsers.place(phone, selector))


def stroke(phone: Page, selector: str, start: float, end: float) -> None:
    places = [browsers.place(phone, selector, across=across) for across in (start, end)]
    browsers.touch(phone, places[0], to=places[1])


def wait_for_change(phone: Page, script: str, before: object) -> None:
    phone.wait_for_function(f"before => ({script}) !== before", arg=before)


GESTURES = {
    "along the walk": lambda phone: stroke(phone, "#walk", 0.5, 0.9),
    "along a number": lambda phone: stroke(phone, "#sliders label:first-child input", 0.4, 0.8),
    "on a neighbour": lambda phone: tap(phone, "#neighbours .tile:first-child"),
    "on a sample": lambda phone: tap(phone, "#samples .tile:first-child"),
    "on another start": lambda phone: tap(phone, "#left-random"),
}


@pytest.mark.parametrize("gesture", GESTURES)
def test_a_finger_leads_to_another_picture(phone, model_folder, gesture):
    before = pixels(phone, "current")
    numbers = phone.input_value("#numbers")
    GESTURES[gesture](phone)
    wait_for_change(phone, "byId('numbers').value", numbers)
    shown = pixels(phone, "current")
    assert (shown != before).any()
    assert_drawn(shown, aegan.decode(aegan.load(model_folder), latent(phone))[0])


def test_a_finger_draws_other_samples_plays_and_chooses_a_file(phone):
    first = "byId('samples').firstChild.latent[0]"
    before = phone.evaluate(first)
    tap(phone, "#again")
    wait_for_change(phone, first, before)
    before = phone.input_value("#walk")
    tap(phone, "#play")
    wait_for_change(phone, "byId('walk').value", before)
    tap(phone, "#play")
    phone.wait_for_selector("#play[aria-pressed=false]")
    with phone.expect_file_chooser():
        tap(phone, "label:has(#right-file)")


def test_a_finger_that_scrolls_leaves_the_slider_that_it_began_on(phone):
    slider = "#sliders label:nth-child(3) input"
    numbers = phone.input_value("#numbers")
    tap(phone, "#samples .tile:first-child")
    wait_for_change(phone, "byId('numbers').value", numbers)
    before, picture = latent(phone), pixels(phone, "current")
    x, y = browsers.place(phone, slider, across=0.9)
    scrolled = phone.evaluate("scrollY")
    browsers.touch(phone, (x, y), to=(x - 60, y - 300))
    wait_for_change(phone, "scrollY", scrolled)
    assert (latent(phone) == before).all()
    assert (pixels(phone, "current") == picture).all()


def test_on_a_telephone_everything_fits_and_can_be_hit(phone):
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    heights = phone.evaluate(
        """names => [...document.querySelectorAll(names)]
          .filter(found => found.offsetParent)
          .map(found => found.getBoundingClientRect().height)""",
        "button, .button, select, textarea, summary, [type=range]",
    )
    assert len(heights) > 30
    assert min(heights) >= 24


def test_a_telephone_s_48_megapixels_are_read_while_the_page_stays_responsive(
    browser, page, model_folder
):
    opened = browsers.open_page(browser, model_folder.parent / "explorer.html")
    photograph = Image.linear_gradient("L").resize((8000, 6000)).convert("RGB")
    content = encoded(photograph, "JPEG", quality=80)
    found, waited, longest = opened.evaluate(
        """async content => {
          const blob = new Blob([Uint8Array.from(atob(content), letter => letter.charCodeAt())]);
          const began = performance.now();
          let last = began, longest = 0;
          const ticking = setInterval(() => {
            longest = Math.max(longest, performance.now() - last);
            last = performance.now();
          }, 10);
          const picture = await readPicture(blob, {imageSize: 16, channels: 3, fit: "crop"});
          clearInterval(ticking);
          const now = performance.now();
          return [[...picture.data], now - began, Math.max(longest, now - last)];
        }""",
        base64.b64encode(content).decode(),
    )
    expected = decode_image(content, image_size=16, image_channels=3)
    assert np.abs(np.array(found) - expected.reshape(-1).astype(int)).max() <= 3
    assert longest < waited / 2
    opened.context.close()


def test_a_model_without_encoder_offers_its_own_pictures_and_says_why(browser, tmp_path):
    folder = write_model(tmp_path / "model", encoder=False)
    exports.explore(str(folder), tmp_path / "explorer.html")
    opened = browsers.open_page(browser, tmp_path / "explorer.html")
    assert "cannot look at pictures of yours" in opened.inner_text("header")
    assert opened.locator("input[type=file]").count() == 0
    assert_drawn(pixels(opened, "current"), aegan.decode(aegan.load(folder), latent(opened))[0])
    opened.context.close()


def test_a_model_of_classes_draws_the_class_that_is_chosen(browser, tmp_path):
    classes = ("cats", "</script><b>dogs")
    folder = write_gray_model_of_classes(tmp_path / "model", classes)
    exports.explore(str(folder), tmp_path / "explorer.html")
    opened = browsers.open_page(browser, tmp_path / "explorer.html")
    opened.select_option("#class", label=classes[1])
    pixels(opened, "current")
    opened.click("#samples button >> nth=0")
    z = latent(opened)
    assert z[0, :2].tolist() == [0, 1]
    shown = np.repeat(aegan.decode(aegan.load(folder), z)[0].numpy(), 3, axis=2)
    assert_drawn(pixels(opened, "current"), torch.from_numpy(shown))
    opened.context.close()


def write_gray_model_of_classes(folder: Path, classes: tuple[str, ...]) -> Path:
    networks = ModelConfig(
        architecture="paper",
        latent_dim=8,
        prior="label(2) * sphere(4) * uniform(2)",
        base_channels=4,
    )
    return write_model(folder, networks=networks, channels=1, fit="pad", classes=list(classes))
