"""The head of a plain JPEG: what it tells is what Pillow tells, and in doubt it tells nothing."""

import importlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from resfeat.backbones.ours import IMAGENET
from resfeat.decoding import decode
from resfeat.decoding.jpeg import head_of
from resfeat.decoding.pillow import turn_for
from resfeat.errors import Failure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
module = importlib.import_module("resfeat.decoding.decode")  # its function has the same name
PICTURE = Image.effect_noise((90, 60), 60).convert("RGB").resize((330, 250))


def jpeg(picture=PICTURE, orientation=None, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[0x010F] = "a maker of cameras"  # before the orientation, and not in its entry
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    content = io.BytesIO()
    picture.save(content, "JPEG", **options)
    return content.getvalue()


def without(data):
    """What comes of it by Pillow's reading of the head."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "head_of", lambda data: None)
        return decode(data, IMAGENET, "turbo")


def same(data):
    given, expected = decode(data, IMAGENET, "turbo"), without(data)
    if isinstance(expected, Failure):
        return given == expected
    size = (given.width, given.height) == (expected.width, expected.height)
    return size and np.array_equal(given.pixels, expected.pixels)


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PLAIN = {
    "as Pillow writes it": jpeg(),
    "progressive": jpeg(progressive=True),
    "grey": jpeg(PICTURE.convert("L")),
    "with a comment": jpeg(comment=b"x" * 300),
    "with a profile": jpeg(icc_profile=PROFILE),
    "restarts": jpeg(restart_marker_rows=1),
    "full colour": jpeg(subsampling=0, quality=100),
    **{f"turned {value}": jpeg(orientation=value) for value in range(10)},
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_cameras_and_the_web_write_needs_no_pillow(name):
    data = PLAIN[name]
    head = head_of(data)
    with Image.open(io.BytesIO(data)) as image:
        assert head[:2] == image.size
        assert head.turn == turn_for(image.getexif().get(0x0112))
        assert head.progressive == bool(image.info.get("progressive"))
    assert same(data)


def with_segment(marker, content, data=PLAIN["as Pillow writes it"]):
    """The same with one more segment in front."""
    length = (len(content) + 2).to_bytes(2, "big")
    return data[:2] + bytes([0xFF, marker]) + length + content + data[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
TIFF = b"Exif\0\0MM\0*\0\0\0\x08"
ODD = {
    "of four colours": jpeg(PICTURE.convert("CMYK")),
    "turned by XMP": with_segment(0xE1, XMP),
    "with two heads of EXIF": with_segment(0xE1, TIFF + bytes(6), PLAIN["turned 6"]),
    "EXIF that is cut": with_segment(0xE1, TIFF + b"\0\x05"),
    "an orientation of another type": with_segment(
        0xE1, TIFF + b"\0\x01\x01\x12\0\x04\0\0\0\x01\0\0\0\x06" + bytes(4)
    ),
    "an orientation behind a value that is not there": with_segment(
        0xE1,
        TIFF + b"\0\x02\x01\x0f\0\x02\0\0\xff\xff\0\0\x00\x20"
        b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4),
    ),
    "of Photoshop": with_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0"),
    "a profile without a number": with_segment(0xE2, b"ICC_PROFILE\0"),
    "of several pictures": with_segment(0xE2, b"MPF\0MM\0*\0\0\0\x08"),
    "a JFIF that is cut": with_segment(0xE0, b"JFIF\0\x01"),
    "tables that are cut": with_segment(0xDB, b"\0" + bytes(20)),
    "a marker that nobody knows": with_segment(0xF3, b"what is this"),
    "junk between segments": PLAIN["as Pillow writes it"][:20] + b"junk"
    + PLAIN["as Pillow writes it"][20:],
    "too many scans": PLAIN["progressive"][:-2] + b"\xff\xda" * 101 + b"\xff\xd9",
    "cut in its head": PLAIN["as Pillow writes it"][:100],
    "nothing": b"\xff\xd8",
    "a PNG": b"\x89PNG\r\n\x1a\n",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_whatever_leaves_a_doubt_has_the_outcome_that_it_has_by_pillow(name):
    assert same(ODD[name])
    assert name == "too many scans" or head_of(ODD[name]) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PLAIN)), st.data())
def test_any_damage_has_the_outcome_that_it_has_by_pillow(name, chance):
    data = bytearray(PLAIN[name])
    end = data.index(b"\xff\xda")  # most of it in the head
    for _ in range(chance.draw(st.integers(1, 3))):
        data[chance.draw(st.integers(0, min(len(data) - 1, end + 40)))] = chance.draw(
            st.integers(0, 255)
        )
    if chance.draw(st.booleans()):
        del data[chance.draw(st.integers(0, len(data) - 1)) :]
    assert same(bytes(data))
