"""Colours as files state them -> sRGB, through ICC profiles.

A picture says what its numbers mean in one of several ways. Each becomes the bytes of an ICC
profile, so that one path (LittleCMS) converts all; a statement that is absent, damaged or the same
as sRGB converts nothing. A PNG's statements count in the order of its specification.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from aegan.data.image_headers import png_header

MAX_PROFILE_BYTES = 4 * 1024**2  # of presses: 0.5 to 2.7 MB; larger ones are not looked at
CURVE_POINTS = 4096
SDR_WHITE = 203.0  # candela a square metre: what BT.2408 gives diffuse white in HDR pictures
HDR_PEAK = 1000.0  # and the brightest that is kept apart from white

Chromaticities = tuple[float, float, float, float, float, float, float, float]  # of white, R, G, B

SRGB: Chromaticities = (0.3127, 0.3290, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
PRIMARIES: dict[int, Chromaticities] = {  # ITU-T H.273, table 2
    1: SRGB,  # BT.709
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),  # BT.470 M
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),  # BT.601, 625 lines
    6: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # BT.601, 525 lines
    7: (0.3127, 0.3290, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),  # SMPTE 240M
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI P3
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
    22: (0.3127, 0.3290, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),  # EBU 3213
}
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_D50 = np.array([0.9642, 1.0, 0.8249])  # the white of ICC profiles


def profile_of(file: Image.Image, content: bytes) -> bytes | None:
    """The ICC profile that an opened file carries, or one for what it says in other words."""
    if file.format == "PNG":
        cicp = png_header(content).get(b"cICP", b"")
        if len(cicp) == 4:
            profile = _coded(cicp[0], cicp[1], full_range=cicp[3] != 0)
            if profile or cicp[:2] == b"\x01\x0d":
                return profile
        if not file.info.get("icc_profile"):
            if "srgb" in file.info:
                return None
            return _measured(file.info.get("gamma"), file.info.get("chromaticity"))
    elif file.format in ("AVIF", "HEIF", "JPEG2000") and not file.info.get("icc_profile"):
        return _in_boxes(content)
    profile = file.info.get("icc_profile")
    return profile if isinstance(profile, bytes) else None


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB, CMYK or LAB, of the colours that the profile says => L or RGB."""
    if image.mode == "LAB":
        return _applied(_lab(), image) or image.convert("L")
    if profile and len(profile) <= MAX_PROFILE_BYTES:
        space = profile[16:20]
        if image.mode == "L" and space == b"RGB ":  # grey values on an RGB curve
            image = image.convert("RGB")
        converted = _applied(_transform(profile, image.mode), image)
        if converted:
            return converted
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _applied(
    transform: ImageCms.ImageCmsTransform | None, image: Image.Image
) -> Image.Image | None:
    try:
        return ImageCms.applyTransform(image, transform) if transform else None
    except (ImageCms.PyCMSError, ValueError):
        return None


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where that changes nothing, or the profile is of no use."""
    if {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}.get(profile[16:20]) != mode:
        return None
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,  # SWOP to sRGB and back: 7.2 levels off, colorimetric 9.1
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return None if mode != "CMYK" and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether 4,096 colours stay within a level: the profile is sRGB, whatever it is called."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        colours = levels[None]
    else:
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    plain = Image.fromarray(colours)
    converted = _applied(transform, plain)
    if converted is None:
        return True
    difference = np.asarray(converted, np.int16) - np.asarray(plain.convert("RGB"), np.int16)
    return bool(np.abs(difference).max() <= 1)


@lru_cache(maxsize=1)
def _lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _in_boxes(content: bytes) -> bytes | None:
    """The box `colr` of AVIF, HEIF and JPEG 2000, which Pillow passes over."""
    at = content.find(b"colr", 0, 1 << 16)
    if at < 4:
        return None
    if content[at + 4 : at + 8] == b"nclx" and len(content) >= at + 12:
        primaries, transfer = struct.unpack_from(">HH", content, at + 8)
        # Tools write BT.709's curve for any picture, and browsers show such files as sRGB.
        return _coded(primaries, 13 if transfer in (1, 6, 14, 15) else transfer)
    if content[at + 4] == 2:  # JPEG 2000: a restricted ICC profile
        (size,) = struct.unpack_from(">I", content, at - 4)
        return content[at + 7 : at - 4 + size]
    return None


def _measured(gamma: Any, chromaticities: Any) -> bytes | None:
    """PNG's gAMA (the exponent of encoding) and cHRM (white, red, green, blue)."""
    if chromaticities is not None:
        near = np.allclose(chromaticities, SRGB, atol=1e-3)
        chromaticities = SRGB if near else tuple(map(float, chromaticities))
    # Programs write 1 / 2.2 for sRGB, whose curve differs from that power by 7 levels in the dark:
    # so the samples become values for a screen of exponent 2.2, as the specification computes.
    exponent = 1 if gamma is None or abs(gamma - 1 / 2.2) < 1e-3 else 1 / max(gamma * 2.2, 1e-9)
    if (exponent == 1 and chromaticities in (None, SRGB)) or not 0.1 <= exponent <= 10:
        return None
    return _profile(chromaticities or SRGB, lambda values: _srgb_curve(values**exponent))


def _coded(primaries: int, transfer: int, *, full_range: bool = True) -> bytes | None:
    """Code points of ITU-T H.273; None for sRGB itself and for what is unknown or unspecified."""
    curve = CURVES.get(transfer)
    if curve is None or primaries not in PRIMARIES:
        return None
    if full_range:
        return None if (primaries, transfer) == (1, 13) else _profile(PRIMARIES[primaries], curve)
    narrow = curve
    return _profile(
        PRIMARIES[primaries], lambda values: narrow(np.clip((values * 255 - 16) / 219, 0, 1))
    )


def _srgb_curve(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _bt709_curve(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0.081, values / 4.5, ((values + 0.099) / 1.099) ** (1 / 0.45))


def _pq_curve(values: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    power = values ** (1 / 78.84375)
    light = np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)
    return _tone_mapped(10_000 * light ** (1 / 0.1593017578125))


def _hlg_curve(values: np.ndarray) -> np.ndarray:
    """ARIB STD-B67, on a screen of 1000 candela a square metre; its gamma for each channel."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
    return _tone_mapped(1000 * scene**1.2)


def _tone_mapped(light: np.ndarray) -> np.ndarray:
    """As it is up to half of white, Reinhard's curve above: HDR's highlights keep their shades."""
    above, most = (np.maximum(2 * each / SDR_WHITE - 1, 0) for each in (light, HDR_PEAK))
    rolled = np.minimum(above * (1 + above / most**2) / (1 + above), 1)
    return np.asarray(np.minimum(light / SDR_WHITE, 0.5) + rolled / 2)


CURVES: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # ITU-T H.273, table 3: values => light
    **dict.fromkeys((1, 6, 14, 15), _bt709_curve),
    4: lambda values: values**2.2,
    5: lambda values: values**2.8,
    8: lambda values: values,
    13: _srgb_curve,
    16: _pq_curve,
    18: _hlg_curve,
}


def _profile(
    chromaticities: Chromaticities, curve: Callable[[np.ndarray], np.ndarray]
) -> bytes | None:
    """An ICC profile of three primaries and one curve (ICC.1:2001-04); None for absurd numbers."""
    xy = np.array(chromaticities).reshape(4, 2)
    if (xy[:, 1] <= 0).any() or not np.isfinite(xy).all():
        return None
    white, *primaries = np.column_stack([xy[:, 0], xy[:, 1], 1 - xy.sum(axis=1)]) / xy[:, 1:]
    try:
        to_xyz = np.column_stack(primaries) * np.linalg.solve(np.column_stack(primaries), white)
    except np.linalg.LinAlgError:
        return None
    adapted = (
        np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD
    )
    columns = (adapted @ to_xyz).T
    if not (np.abs(columns) < 4).all():
        return None
    points = np.round(curve(np.linspace(0, 1, CURVE_POINTS)) * 65535).astype(">u2").tobytes()
    tags = {b"wtpt": _xyz(_D50)}
    tags |= {
        name: _xyz(column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True)
    }
    curve_tag = b"curv\0\0\0\0" + struct.pack(">I", CURVE_POINTS) + points
    table, body = b"", b"".join(tags.values())
    at = 128 + 4 + 12 * 7
    for name, tag in tags.items():
        table += name + struct.pack(">II", at, len(tag))
        at += len(tag)
    for name in (b"rTRC", b"gTRC", b"bTRC"):
        table += name + struct.pack(">II", at, len(curve_tag))
    size = at + len(curve_tag)
    header = struct.pack(">I4xI", size, 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header += bytes(28) + _xyz(_D50)[8:]
    return header.ljust(128, b"\0") + struct.pack(">I", 7) + table + body + curve_tag


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + np.round(values * 65536).astype(">i4").tobytes()
