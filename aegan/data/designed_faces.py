"""The designed data set: cartoon faces whose manifold is known, drawn from eight factors.

A picture is a continuous function of its factors, and the mirror image of a face is the face with
its yaw negated. A shape is a signed distance turned into coverage over one pixel, so its edge is
smooth at any size; shapes are painted back to front. Space is [-1, 1] x [-1, 1], y down.

Image i depends on nothing but (seed, i). Factors and pixels are made by integer arithmetic and
+ - * / sqrt, which IEEE 754 rounds the same everywhere: the bytes do not depend on chunks, threads,
vector units or a maths library.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]  # float32, where nothing else is said


class Factor(NamedTuple):
    """One coordinate of the manifold, uniform in [low, high); a circular one wraps there."""

    name: str
    low: float
    high: float
    circular: bool


FACTORS: tuple[Factor, ...] = (
    Factor("yaw", -0.5, 0.5, circular=False),  # radians, positive: turned to the picture's right
    Factor("skin_tone", 0.0, 1.0, circular=False),  # light to deep
    Factor("hair_hue", 0.0, 1.0, circular=True),  # turns around _HAIR, as the other hues
    Factor("hair_length", 0.0, 1.0, circular=False),  # above the chin to the lower edge
    Factor("eye_openness", 0.4, 1.0, circular=False),  # never shut: the eye's colour stays visible
    Factor("eye_hue", 0.0, 1.0, circular=True),
    Factor("mouth_curve", -1.0, 1.0, circular=False),  # pout to open smile
    Factor("background_hue", 0.0, 1.0, circular=True),
)

# Colours at equal steps around each wheel and along the scale of skins, chosen by eye.
_HAIR = ["e8688f", "e8604f", "f09a3e", "f2d06b", "7fbf5f", "3fb5a8", "4a86d8", "8a68cc"]
_EYES = ["d83a5c", "e07a28", "d8b020", "5cb02c", "1fa888", "2a84dc", "5a54d8", "b03cc0"]
_BACKGROUND = ["f7b4c4", "fbc9a0", "f5e296", "bce2a0", "9fdacb", "a2caf0", "b9b8f2", "deb2ea"]
_SKIN = ["ffe9dc", "fbd5bb", "eab88f", "c48a5e", "8a5a3c"]

_DUSK, _WARM, _INK = "2a1840", "a0305a", "201028"  # shadow on hair, on skin; lines

_CHUNK_PIXELS = 1 << 18  # of one colour plane at a time: more would leave the cache


def sample_factors(indices: ArrayLike, *, seed: int) -> Array:
    """Factors of the images with these indices => float32 [N, len(FACTORS)]."""
    columns = np.arange(len(FACTORS), dtype=np.uint64)
    counters: Array = np.asarray(indices, np.uint64)[:, None] * len(FACTORS) + columns
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([seed % 2**64], np.uint64) + golden)
    uniform = (_mix(start + counters * golden) >> np.uint64(40)).astype(np.float32) / (1 << 24)
    low = np.array([factor.low for factor in FACTORS], np.float32)
    high = np.array([factor.high for factor in FACTORS], np.float32)
    return low + (high - low) * uniform


def _mix(z: Array) -> Array:
    """The finaliser of SplitMix64: a bijection of 64-bit words that scrambles counters."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def generate(
    start: int, count: int, *, seed: int, image_size: int
) -> tuple[NDArray[np.uint8], Array]:
    """Images start .. start + count - 1 => uint8 [N, H, W, 3] and their factors [N, F]."""
    factors = sample_factors(np.arange(start, start + count), seed=seed)
    return render(factors, image_size=image_size), factors


def render(factors: Array, *, image_size: int) -> NDArray[np.uint8]:
    """Factors [N, len(FACTORS)] => uint8 [N, H, W, 3], H = W = image_size."""
    factors = np.asarray(factors, np.float32)
    images = np.empty((len(factors), image_size, image_size, 3), np.uint8)
    chunk = _CHUNK_PIXELS // image_size**2
    if chunk < 16:  # short runs along the last axis are slower than none
        chunk = 1
    for start in range(0, len(factors), chunk):
        part = factors[start : start + chunk]
        canvas = _Canvas.blank(len(part), image_size)
        _draw(canvas, _Look.of(part))
        pixels = (canvas.planes * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        images[start : start + chunk] = pixels.transpose(3, 1, 2, 0)
    return images


# ---------------------------------------------------------------- what the factors mean


@dataclass(frozen=True)
class _Look:
    """Factors made concrete: per-image numbers [N] and colours [3, N]."""

    sin: Array  # of the yaw
    cos: Array
    hair_end: Array  # y of the lowest tips
    openness: Array
    smile: Array
    skin: Array
    hair: Array
    eyes: Array
    background: Array

    @staticmethod
    def of(factors: Array) -> "_Look":
        yaw, skin, hair, length, openness, eyes, smile, background = factors.T.copy()
        sin = yaw * (1 - yaw * yaw / 6)  # close enough, and needs no maths library
        return _Look(
            sin=sin,
            cos=np.sqrt(1 - sin * sin),
            hair_end=0.24 + 0.7 * length,
            openness=openness,
            smile=0.35 + 0.65 * smile,
            skin=_blend(_SKIN, skin),
            hair=_wheel(_HAIR, hair),
            eyes=_wheel(_EYES, eyes),
            background=_wheel(_BACKGROUND, background),
        )

    def place(self, x: float, depth: float) -> Array:
        """Where a point of the head, `depth` in front of its axis, lands after the turn."""
        return x * self.cos + depth * self.sin

    def width(self, side: int) -> Array:
        """How wide what sits on a side of the face appears: the far side is seen at a slant."""
        return self.cos - 0.35 * side * self.sin


def _blend(palette: list[str], share: Array) -> Array:
    """The colour at a share [N] of the way along a palette => [3, N] in [0, 1]."""
    colors = np.hstack([_solid(color) for color in palette])
    position = np.clip(share, 0, 1) * np.float32(len(palette) - 1)
    left = np.minimum(position.astype(np.int64), len(palette) - 2)
    start = colors[:, left]
    start += (position - left.astype(np.float32)) * (colors[:, left + 1] - start)
    return start


def _wheel(palette: list[str], turns: Array) -> Array:
    """The same around a circle: the first colour follows the last."""
    return _blend([*palette, palette[0]], turns - np.floor(turns))


def _mixed(color: Array, other: str, share: float) -> Array:
    """A colour [3, N] moved towards another one."""
    return color + share * (_solid(other) - color)


def _solid(color: str) -> Array:
    """A colour [3, 1] for all images."""
    return np.array([[level] for level in bytes.fromhex(color)], np.float32) / 255


def _between(start: Iterable[Array], end: Iterable[Array], t: Array) -> list[Array]:
    """Per channel, the colour a share t of the way from one colour [3, N] to another."""
    return [a + (b - a) * t for a, b in zip(start, end, strict=True)]


# ---------------------------------------------------------------- drawing tools


@dataclass(frozen=True)
class _Canvas:
    """A window of the pictures. Images lie along the LAST axis, so that a row of a window is one
    contiguous run, and what depends on x or y alone is worked out on [w, N] or [h, 1, N]."""

    planes: Array  # [3, h, w, N] in [0, 1]
    x: Array  # [w, 1]
    y: Array  # [h, 1, 1]
    pixel: float

    @staticmethod
    def blank(count: int, size: int) -> "_Canvas":
        middle = (np.arange(size, dtype=np.float32) * 2 + 1 - size) / np.float32(size)
        planes = np.empty((3, size, size, count), np.float32)
        return _Canvas(planes, middle[:, None], middle[:, None, None], 2 / size)

    def window(self, left: float, top: float, right: float, bottom: float) -> "_Canvas":
        """The part where a shape can be seen, and a pixel more all around."""
        inside = [
            slice(*np.searchsorted(axis.ravel(), (low - self.pixel, high + self.pixel)))
            for axis, low, high in ((self.x, left, right), (self.y, top, bottom))
        ]
        planes = self.planes[:, inside[1], inside[0]]
        return _Canvas(planes, self.x[inside[0]], self.y[inside[1]], self.pixel)

    def half(self, side: int, top: float, bottom: float) -> "_Canvas":
        """Where an eye or a brow of one side can be, however the head is turned."""
        return self.window(
            min(0.75 * side, -0.25 * side), top, max(0.75 * side, -0.25 * side), bottom
        )

    def cover(self, distance: Array, blur: float = 0.0) -> Array:
        """Signed distance (negative inside) => coverage in [0, 1], over one pixel or `blur`."""
        coverage = distance * np.float32(-1 / max(blur, self.pixel))
        coverage += np.float32(0.5)
        return np.clip(coverage, 0, 1, out=coverage)

    def paint(self, coverage: Array, color: Array | list[Array]) -> None:
        """Lay a colour [3, N], or one that varies over the window, over what is there."""
        for plane, level in zip(self.planes, color, strict=True):
            change = level - plane
            change *= coverage
            plane += change

    def ellipse(
        self, cx: float | Array, cy: float | Array, rx: float | Array, ry: float | Array
    ) -> Array:
        """Distance to an ellipse, to first order; its middle and width may vary with y."""
        u = np.square((self.x - cx) / rx)
        v = np.square((self.y - cy) / ry)
        slope = u / (rx * rx) + v / (ry * ry)
        slope += 1e-6
        np.sqrt(slope, out=slope)
        slope *= 2
        distance = u + v
        distance -= 1
        distance /= slope
        return distance


def _ease(t: Array) -> Array:
    """Smooth step from 0 (t <= 0) to 1 (t >= 1)."""
    t = np.clip(t, 0, 1)
    t *= t * (3 - 2 * t)
    return t


def _wave(t: Array) -> Array:
    """An even wave of period 1 in [0, 1]: 1 at whole t, 0 half-way. Much like a cosine."""
    return _ease(np.abs(t - np.floor(t + np.float32(0.5))) * -2 + 1)


# ---------------------------------------------------------------- the face, back to front


def _draw(canvas: _Canvas, look: _Look) -> None:
    _draw_background(canvas, look)
    _draw_back_hair(canvas, look)
    _draw_body(canvas, look)
    _draw_head(canvas, look)
    _draw_mouth(canvas, look)
    for side in (-1, 1):
        _draw_eye(canvas, look, side)
    for side in (-1, 1):
        _draw_lock(canvas, look, side)
    _draw_fringe(canvas, look)
    for side in (-1, 1):
        _draw_brow(canvas, look, side)


def _draw_background(canvas: _Canvas, look: _Look) -> None:
    """A vertical gradient with a soft glow behind the head."""
    light = _mixed(look.background, "ffffff", 0.45)
    shades = _between(look.background, light, (canvas.y + 1) / 2)
    for plane, shade in zip(canvas.planes, shades, strict=True):
        plane[:] = shade
    glow = canvas.cover(canvas.ellipse(0, -0.1, 0.9, 0.9), blur=0.5)
    canvas.paint(glow * 0.6, light)


def _draw_back_hair(canvas: _Canvas, look: _Look) -> None:
    """The back of the skull, which turns the other way, and the curtain that hangs from it."""
    area = canvas.window(-0.85, -0.95, 0.85, 1.0)
    middle = -0.08 * look.sin
    skull = area.ellipse(middle, -0.21, 0.7, 0.64)
    rounding = np.square(np.clip((area.y - look.hair_end + 0.35) / 0.35, 0, 1))
    half = 0.61 + 0.09 * _ease((area.y + 0.2) / 1.1) - 0.13 * rounding
    ends = look.hair_end - 0.02 - 0.05 * _wave((area.x - middle) * 4)
    curtain = np.maximum(np.abs(area.x - middle) - half, area.y - ends)
    np.maximum(curtain, -0.1 - area.y, out=curtain)
    area.paint(area.cover(np.minimum(skull, curtain)), _mixed(look.hair, _DUSK, 0.45))


def _draw_body(canvas: _Canvas, look: _Look) -> None:
    """Blouse and sailor collar, the neck in the chin's shadow, a bow."""
    area = canvas.window(-0.95, 0.4, 0.95, 1.0)
    area.paint(area.cover(area.ellipse(0, 1.2, 0.88, 0.44)), _solid("fbf8ff"))
    collar = area.ellipse(0, 1.12, 0.58, 0.44)
    area.paint(area.cover(collar), _solid("3d4a86"))
    area.paint(area.cover(np.abs(collar + 0.06) - 0.013), _solid("f4f4fb"))
    neckline = 0.17 - 0.19 * _ease((area.y - 0.64) / 0.26)
    middle = 0.06 * look.sin * _ease((0.8 - area.y) / 0.3)
    shade = _between(_mixed(look.skin, _WARM, 0.35), look.skin, _ease((area.y - 0.6) / 0.2))
    area.paint(area.cover(np.abs(area.x - middle) - neckline), shade)
    bow = np.maximum(np.abs(area.y - 0.9) - 0.02 - 0.4 * np.abs(area.x), np.abs(area.x) - 0.19)
    area.paint(area.cover(bow), _solid("e8475f"))
    area.paint(area.cover(area.ellipse(0, 0.9, 0.05, 0.055)), _solid("b52f4c"))


def _draw_head(canvas: _Canvas, look: _Look) -> None:
    """Ears, the outline of the face, blush and a hint of a nose."""
    shadow = _mixed(look.skin, _WARM, 0.3)
    area = canvas.window(-0.75, -0.2, 0.75, 0.4)
    for side in (-1, 1):
        middle = look.place(0.5 * side, 0.0)
        area.paint(area.cover(area.ellipse(middle, 0.14, 0.1, 0.15)), look.skin)
        area.paint(area.cover(area.ellipse(middle, 0.14, 0.05, 0.09)), shadow)
    area = canvas.window(-0.75, -0.75, 0.75, 0.65)
    low = np.clip((area.y - 0.02) / 0.55, 0, 1)
    face = area.ellipse(look.sin * (0.06 + 0.14 * low), -0.05, 0.54 - 0.16 * low * low, 0.64)
    inside = area.cover(face)
    area.paint(inside, look.skin)
    for side in (-1, 1):
        cheek = area.ellipse(look.place(0.33 * side, 0.28), 0.3, 0.1 * look.width(side), 0.06)
        area.paint(area.cover(cheek, blur=0.12) * inside * 0.7, _mixed(look.skin, "ff4f6a", 0.5))
    area = canvas.window(-0.4, 0.1, 0.4, 0.4)
    nose = area.ellipse(look.place(0, 0.5), 0.25, 0.026, 0.02)
    area.paint(area.cover(nose, blur=0.03), shadow)


def _draw_mouth(canvas: _Canvas, look: _Look) -> None:
    """A stroke that bends; a smile opens it."""
    area = canvas.window(-0.5, 0.2, 0.5, 0.65)
    width = 0.16 * look.cos
    u = (area.x - look.place(0, 0.4)) / width
    rise = np.maximum(1 - u * u, 0)
    opening = 0.06 * np.square(np.maximum(look.smile, 0)) * rise
    curve = 0.4 + 0.125 * look.smile * (rise - 0.5)
    inside = np.abs(area.y - curve) - opening
    beyond = np.maximum(np.abs(u) - 1, 0) * width
    outline = np.sqrt(np.square(np.maximum(inside, 0)) + beyond * beyond)
    outline += np.minimum(inside, 0)
    area.paint(area.cover(outline - 0.02), _mixed(look.skin, "740c34", 0.85))
    tongue = np.maximum(outline + 0.012, curve + 0.012 - area.y)
    area.paint(area.cover(tongue), _solid("f0788c"))


def _draw_eye(canvas: _Canvas, look: _Look, side: int) -> None:
    """Lashes, white, iris with pupil and highlights; closing lowers the upper lid."""
    area = canvas.half(side, -0.25, 0.35)
    middle, width = look.place(0.26 * side, 0.29), look.width(side)
    u = (area.x - middle) / width
    lid = 0.2 - 0.34 * look.openness + (2.4 * u + 0.2 * side) * u - area.y  # negative: below it
    outline = area.ellipse(middle + 0.012 * side * width, 0.03, 0.195 * width, 0.235)
    area.paint(area.cover(np.maximum(outline, lid - 0.042)), _mixed(look.hair, _INK, 0.85))
    white = area.cover(np.maximum(area.ellipse(middle, 0.066, 0.165 * width, 0.2), lid))
    area.paint(white, _solid("fffafc"))
    iris = area.cover(area.ellipse(middle, 0.075, 0.125 * width, 0.178)) * white
    dark, light = _mixed(look.eyes, _INK, 0.45), _mixed(look.eyes, "ffffff", 0.25)
    area.paint(iris, _between(dark, light, _ease((area.y + 0.1) / 0.3)))
    pupil = area.cover(area.ellipse(middle, 0.07, 0.052 * width, 0.085)) * white
    area.paint(pupil, _mixed(look.eyes, _INK, 0.85))
    for x, y, rx, ry in ((0.05, 0.0, 0.045, 0.052), (-0.055, 0.155, 0.026, 0.027)):
        spot = area.ellipse(middle + x * side * width, y, rx * width, ry)
        area.paint(area.cover(spot) * white, _solid("ffffff"))


def _draw_brow(canvas: _Canvas, look: _Look, side: int) -> None:
    """An arch, its outer end lower; drawn over the fringe, as the style has it."""
    area = canvas.half(side, -0.45, -0.1)
    width = 0.1 * look.width(side)
    u = (area.x - look.place(0.27 * side, 0.31)) / width
    curve = -0.3 + 0.03 * u * u + 0.02 * side * u
    beyond = np.maximum(np.abs(u) - 1, 0) * width
    stroke = np.sqrt(np.square(area.y - curve) + beyond * beyond) - 0.02
    area.paint(area.cover(stroke) * 0.65, _mixed(look.hair, _INK, 0.6))


def _draw_lock(canvas: _Canvas, look: _Look, side: int) -> None:
    """A strand before the ear, pointed where the hair ends."""
    area = canvas.window(-0.9, -0.35, 0.9, 1.0)
    taper = np.clip((look.hair_end - area.y) / 0.35, 0, 1)
    half = 0.12 * look.width(side) * taper * (2 - taper) * _ease((area.y + 0.5) / 0.3)
    offset = area.x - look.place(0.55 * side, 0.16) - 0.07 * side * _ease((area.y + 0.2) / 0.7)
    lock = np.maximum(np.abs(offset) - half, area.y - look.hair_end)
    shade = _ease(0.5 - 5 * side * offset)
    area.paint(area.cover(lock), _between(look.hair, _mixed(look.hair, _DUSK, 0.22), shade))


def _draw_fringe(canvas: _Canvas, look: _Look) -> None:
    """The cap of hair: fringe with its shadow on the forehead, and a band of light."""
    area = canvas.window(-0.85, -0.95, 0.85, 0.36)
    middle = 0.02 * look.sin
    cap = area.ellipse(middle, -0.14, 0.685, 0.72)
    u = np.clip((area.x - middle) / 0.685, -1, 1)
    # Around the head, from the middle of the forehead: nearly arcsin(u) - yaw.
    angle = u + u * u * u * (0.17 + 0.12 * u * u) - 1.02 * look.sin
    wave = _wave(2.4 * angle)  # the fringe's strands; 1 between two of them
    edge = -0.12 - 0.16 * wave + 0.25 * angle * angle
    shadow = np.maximum(cap + 0.06, 0.7 * (area.y - edge - 0.05))
    area.paint(area.cover(shadow) * 0.18, _solid(_INK))
    fringe = area.cover(np.maximum(cap, 0.7 * (area.y - edge)))
    depth = wave * wave * _ease((area.y + 0.75) / 0.6)
    lit = _between(_mixed(look.hair, "ffffff", 0.15), look.hair, _ease((area.y + 0.85) / 0.5))
    area.paint(fringe, _between(lit, _mixed(look.hair, _DUSK, 0.25), depth))
    thickness = 0.08 * _ease(1.3 - np.abs(angle)) - 0.02
    ring = np.abs(area.y + 0.5 - 0.14 * angle * angle - 0.03 * wave) - thickness
    area.paint(area.cover(ring, blur=0.03) * fringe * 0.8, _mixed(look.hair, "ffffff", 0.45))
