import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aegan.data.file_kinds import START_BYTES, kind_of
from aegan.data.image_files import UnusableImageError, decode_image

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, out)
    return out.getvalue()


def zip_file() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "a")
    return out.getvalue()


KINDS = {
    b"": "an empty file",
    LFS: "a Git LFS pointer: run `git lfs pull`",
    b"<!DOCTYPE html>\n<html><title>Sign in</title>": "an HTML page",
    b"\xef\xbb\xbf  <html>": "an HTML page",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "an XML file",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "an SVG drawing",
    b"\0\0\0\x20ftypisom\0\0\2\0": "a video: extract its frames",
    b"\0\0\0\x14ftypqt  \0\0\2\0": "a video",
    b"\x1a\x45\xdf\xa3\x9f": "a video",
    b"RIFF\0\0\0\0AVI LIST": "a video",
    b"\0\0\0\x18ftypheic\0\0\0\0": "a HEIC photograph: convert",
    b"7z\xbc\xaf\x27\x1c\0\4": "a 7z archive: unpack it",
    b"Rar!\x1a\x07\1\0": "a RAR archive: unpack it",
    b"\x28\xb5\x2f\xfd\4": "Zstandard-compressed",
    b"%PDF-1.7\n": "a PDF: extract",
    b"II*\0\x10\0\0\0CR\2\0": "a camera's raw file",
    bytes(128) + b"DICM": "a DICOM file",
    bytes(344) + b"n+1\0": "a NIfTI volume",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"\x93NUMPY\1\0": "a NumPy array",
    b"\0\0\x08\x03\0\0": "an IDX array",
    pickle.dumps({"image": b"x"}): "a pickle, which can run code",
    pickle.dumps(np.zeros(3), 2): "a pickle",
    torch_file(): "a PyTorch file, a pickle",
    zip_file(): "a zip archive",
    bytes(5000): "all zeros",
    b'{"key": [1, 2]}': "JSON text",
    "name,label\né.png,1\n".encode(): "a table of text (CSV)",
    "ein Märchen\n".encode(): "text",
    "in two bytes".encode("utf-16"): "text",
    b"\x9c\x01\xf0\x11\x82": "",
    b"\x89PNG\r\n\x1a\n": "",
}


@pytest.mark.parametrize("content", KINDS, ids=lambda content: KINDS[content][:20])
def test_a_source_that_is_no_image_says_what_it_is(content):
    kind = kind_of(content[:START_BYTES])
    assert kind.startswith(KINDS[content])
    assert bool(kind) == bool(KINDS[content])


def test_text_that_is_cut_within_a_letter_is_still_text_and_no_source_of_images():
    assert kind_of(("a" * (START_BYTES - 1) + "é").encode()[:START_BYTES]) == "text"


def test_the_reason_for_a_source_that_is_no_image_holds_the_cure():
    with pytest.raises(UnusableImageError, match="not an image: a Git LFS pointer: run `git lfs"):
        decode_image(LFS, image_size=16, image_channels=3)


@given(st.binary(max_size=600))
def test_any_bytes_of_a_source_have_a_kind_or_none_in_printable_words(content):
    assert kind_of(content).isprintable()
