"""What a file that is no image (or no archive) is instead, in words, with the cure if there is one.

Its first bytes alone are looked at; nothing is ever loaded or run.
"""

START_BYTES = 4096  # as many of a file as `kind_of` looks at

_VIDEO = "a video: extract its frames first, `ffmpeg -i VIDEO frames/%06d.png`"
_PICKLE = "a pickle, which can run code when loaded: save the images as files or .npz"
_RAW = "a camera's raw file: develop it to JPEG or PNG first"
_OFFICE = "an Office document of before 2007: extract its images first"
_MARKS = (  # (what stands at the offset, the offset, what such a file is)
    (b"version https://git-lfs.github.com/spec", 0, "a Git LFS pointer: run `git lfs pull` first"),
    (b"version https://hawser.github.com/spec", 0, "a Git LFS pointer: run `git lfs pull` first"),
    (b"/annex/objects/", 0, "a git-annex pointer: run `git annex get` first"),
    (b"\x1a\x45\xdf\xa3", 0, _VIDEO),  # Matroska, WebM
    (b"FLV\x01", 0, _VIDEO),
    (b"\0\0\x01\xba", 0, _VIDEO),  # MPEG
    (b"\0\0\x01\xb3", 0, _VIDEO),
    (b"0&\xb2u\x8ef\xcf\x11", 0, _VIDEO),  # Windows Media
    (b"OggS", 0, "an Ogg sound or video file: of a video, extract the frames first"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive: unpack it, or pack it again as .zip or .tar"),
    (b"Rar!\x1a\x07", 0, "a RAR archive: unpack it, or pack it again as .zip or .tar"),
    (b"\x28\xb5\x2f\xfd", 0, "Zstandard-compressed: unpack it with `zstd -d` first"),
    (b"\x04\x22\x4d\x18", 0, "LZ4-compressed: unpack it with `lz4 -d` first"),
    (b"PK\x03\x04", 0, "a zip archive"),
    (b"PK\x05\x06", 0, "an empty zip archive"),
    (b"\x1f\x8b", 0, "gzip-compressed"),
    (b"BZh", 0, "bzip2-compressed"),
    (b"\xfd7zXZ\0", 0, "xz-compressed"),
    (b"ustar", 257, "a tar archive"),
    (b"PAR1", 0, "a Parquet file"),
    (b"ARROW1", 0, "an Arrow file: write it as Parquet first"),
    (b"\x93NUMPY", 0, "a NumPy array"),
    (b"\0\0\x08\x03", 0, "an IDX array, as MNIST has it: save it with np.save first"),
    (b"%PDF-", 0, "a PDF: extract its pages first, `pdftoppm -png FILE.pdf page`"),
    (b"%!PS", 0, "PostScript: convert it to PNG first"),
    (b"8BPS", 0, "a Photoshop file: export it as PNG first"),
    (b"gimp xcf", 0, "a GIMP file: export it as PNG first"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, _OFFICE),
    (b"DICM", 128, "a DICOM file: export it as PNG first, `dcm2img` or pydicom do"),
    (b"n+1\0", 344, "a NIfTI volume: export its slices as PNG first"),
    (b"ni1\0", 344, "a NIfTI volume: export its slices as PNG first"),
    (b"n+2\0\r\n\x1a\n", 4, "a NIfTI volume: export its slices as PNG first"),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file: export its images as files or .npz first"),
    (b"CDF\x01", 0, "a NetCDF file: export its images as files or .npz first"),
    (b"CDF\x02", 0, "a NetCDF file: export its images as files or .npz first"),
    (b"SIMPLE  =", 0, "a FITS file: export its images as files or .npz first"),
    (b"SQLite format 3\0", 0, "an SQLite database: export its images first"),
    (b"\xde\xc0\xef\xbe", 16, "an LMDB database: export its images first"),
    (b"FUJIFILMCCD-RAW", 0, _RAW),
    (b"FOVb", 0, _RAW),  # Sigma
    (b"IIU\0", 0, _RAW),  # Panasonic
    (b"IIRO", 0, _RAW),  # Olympus
    (b"IIRS", 0, _RAW),
    (b"MMOR", 0, _RAW),
    (b"CR\x02\0", 8, _RAW),  # Canon, within a TIFF
    (b"\0MRM", 0, _RAW),  # Minolta
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", 0, "a JPEG XL image: convert it first, `djxl IN OUT.png`"),
    (b"\xff\x0a", 0, "a JPEG XL image: convert it first, `djxl IN OUT.png`"),
    (b"v/1\x01", 0, "an OpenEXR image: convert it to 8- or 16-bit PNG first"),
    (b"#?RADIANCE", 0, "a Radiance HDR image: convert it to 8- or 16-bit PNG first"),
    (b"ID3", 0, "a sound file"),
    (b"fLaC", 0, "a sound file"),
    (b"\x7fELF", 0, "a program"),
    (b"MZ", 0, "a program"),
)  # fmt: skip
_BRANDS = {  # of ISO base media files: what stands behind `ftyp`
    b"heic": "a HEIC photograph",
    b"heix": "a HEIC photograph",
    b"hevc": "a HEIC photograph",
    b"heim": "a HEIC photograph",
    b"heis": "a HEIC photograph",
    b"mif1": "a HEIF photograph",
    b"msf1": "a HEIF photograph",
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"crx ": _RAW,
    b"M4A ": "a sound file",
}
_IMAGE_MARKS = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),  # JPEG 2000
    *(b"P%d%c" % (kind, space) for kind in range(1, 7) for space in b" \t\r\n"),  # PBM, PGM, PPM
)
_HEIC_CURE = ": convert it first, `heif-convert IN.heic OUT.jpg` or the phone's export as JPEG"


def kind_of(start: bytes) -> str:
    """What a file is by its first bytes (START_BYTES are enough); "" if nobody knows."""
    if not start:
        return "an empty file"
    if start.startswith(b"PK\x03\x04") and b"/data.pkl" in start[:256]:
        return f"a PyTorch file, {_PICKLE}"
    for mark, offset, kind in _MARKS:
        if start.startswith(mark, offset):
            return kind
    if start[4:8] == b"ftyp":
        kind = _BRANDS.get(start[8:12], _VIDEO)
        return kind + _HEIC_CURE if kind.startswith("a HEI") else kind
    if start[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):  # QuickTime of before 2001
        return _VIDEO
    if start.startswith(b"RIFF"):
        return {b"AVI ": _VIDEO, b"WAVE": "a sound file"}.get(start[8:12], "")
    if _is_pickle(start):
        return _PICKLE
    if not any(start):
        return "all zeros: fetch it again"
    return _kind_of_text(start)


def is_image(start: bytes) -> bool:
    """Whether a file begins as those image files do that cannot be taken for anything else."""
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1")
    if start.startswith(b"RIFF"):
        return start[8:12] == b"WEBP"
    return start.startswith(_IMAGE_MARKS)


def _is_pickle(start: bytes) -> bool:
    """A pickle since protocol 2 opens with its version and goes on with a frame or an object."""
    return start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[2:3] in b"\x95}](cX\x8a\x8c"


def _kind_of_text(start: bytes) -> str:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = start[: len(start) // 2 * 2].decode("utf-16", "replace")
    else:
        try:
            text = start.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if error.start < len(start) - 3 or error.reason != "unexpected end of data":
                return ""
            text = start[: error.start].decode("utf-8-sig")
    if any(ord(letter) < 32 and letter not in "\t\n\r\f\x1b" for letter in text):
        return ""
    head = text.lstrip()[:1000].lower()
    if head.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in head:
        return "an HTML page, such as a login or an error: download the file itself again"
    if "<svg" in head:
        return "an SVG drawing: convert it to PNG first"
    if head.startswith("<"):
        return "an XML file, perhaps a server's error: download the file itself again"
    if head.startswith(("{", "[")):
        return "JSON text"
    lines = text.splitlines()[:2]
    if len(lines) == 2 and lines[0].count(",") == lines[1].count(",") > 0:
        return "a table of text (CSV)"
    return "text"
