"""AVIF and HEIC: told apart, turned once, whole or not at all, and without a trace in Pillow."""

import importlib
import io
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pillow_heif
import pytest
from containers import avif, heic
from later import Later
from PIL import AvifImagePlugin, Image, ImageOps

from resfeat.decoding import Picture, decode
from resfeat.decoding.boxes import kind_of
from resfeat.sources.rules import may_be_passed_over
from resfeat.spec import Preprocessing

F = Later("torchvision.transforms.functional")

c_heif = importlib.import_module("_pillow_heif")
PREPROCESSING = Preprocessing(
    resize=40,
    crop=32,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
WAYS = ("turbo", "pillow")
MAKERS = {"AVIF": avif, "HEIC": heic}
ORIENTATION = b"\x01\x12\0\3\0\0\0\1"  # as a big-endian EXIF begins to say it


def picture(width=96, height=72, mode="RGB"):
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    y, x, c = np.mgrid[:height, :width, :3]
    return Image.fromarray((x + y + 10 * c + noise).astype(np.uint8)).convert(mode)


def turned(number):
    exif = Image.Exif()
    exif.endian = ">"
    exif[0x0112] = number
    return exif.tobytes()


def by_pillow(kind, data):
    """As Pillow and pillow-heif themselves have it."""
    image = Image.open(io.BytesIO(data)) if kind == "AVIF" else pillow_heif.open_heif(data)
    image = image if kind == "AVIF" else image.to_pillow()
    resized = F.resize(ImageOps.exif_transpose(image).convert("RGB"), PREPROCESSING.resize)
    return np.asarray(F.center_crop(resized, PREPROCESSING.crop))


def decoded(data, way="pillow"):
    result = decode(data, PREPROCESSING, way)
    assert isinstance(result, Picture), result
    return result


def failure(data, way="pillow"):
    result = decode(data, PREPROCESSING, way)
    assert not isinstance(result, Picture)
    return result.reason, result.message


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", MAKERS)
def test_pixels_are_pillows(kind, turn):
    data = MAKERS[kind](picture(), exif=turned(turn))
    ours = decoded(data)
    assert np.array_equal(ours.pixels, by_pillow(kind, data))
    assert (ours.width, ours.height) == ((72, 96) if turn >= 5 else (96, 72))
    turbo = decoded(data, "turbo")
    assert (turbo.width, turbo.height) == (ours.width, ours.height)
    assert np.abs(turbo.pixels.astype(int) - ours.pixels).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("kind", MAKERS)
def test_grey_and_alpha_are_as_pillow_has_them(kind, mode):
    shown = picture(mode=mode)
    if mode == "RGBA":
        shown.putalpha(picture().convert("L"))
    data, on_white = MAKERS[kind](shown), Image.new("RGBA", shown.size, "white")
    on_white.alpha_composite(shown.convert("RGBA"))
    resized = F.center_crop(F.resize(on_white.convert("RGB"), 40), 32)
    for way in WAYS:
        assert np.abs(decoded(data, way).pixels - np.asarray(resized, int)).mean() < 4


@pytest.mark.parametrize("kind", MAKERS)
def test_what_exif_alone_says_of_orientation_means_nothing(kind):
    """As the standard has it, and Pillow: viewers do not turn such a picture either."""
    plain = MAKERS[kind](picture(), exif=turned(1).replace(b"\x01\x12", b"\x01\x13"))
    said = plain.replace(b"\x01\x13" + ORIENTATION[2:] + b"\0\1", ORIENTATION + b"\0\6")
    assert plain != said and b"irot" not in said
    assert np.array_equal(decoded(said).pixels, decoded(plain).pixels)
    assert np.array_equal(decoded(said).pixels, by_pillow(kind, said))


@pytest.mark.parametrize("tiles", [0, 64])
def test_no_part_of_a_picture_is_a_picture(tiles):
    """libheif gives those tiles of half a file that it has, and leaves the others blank."""
    whole = heic(picture(200, 140), tile_size=tiles)
    cuts = {whole.index(b"mdat") - 4, len(whole) - 1, *range(24, len(whole), len(whole) // 150)}
    reasons = {failure(whole[:cut])[0] for cut in cuts}
    assert reasons == {"truncated"}
    assert isinstance(decode(whole, PREPROCESSING, "pillow"), Picture)


@pytest.mark.parametrize("way", WAYS)
def test_heic_without_the_extra_says_how_to_install_it(way, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reason, message = failure(heic(picture()), way)
    assert reason == "format_not_allowed" and "pip install 'resfeat[heif]'" in message
    decoded(avif(picture()), way)


def test_a_pillow_without_avif_says_so(monkeypatch):
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    reason, message = failure(avif(picture()))
    assert reason == "format_not_allowed" and message.startswith("AVIF;")


@pytest.mark.parametrize(
    "data", [b"\xff\x0a\xfa\x1f", b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl "]
)
def test_jpeg_xl_is_named(data):
    reason, message = failure(data + bytes(50))
    assert reason == "format_not_allowed" and message.startswith("JPEG XL;")


def test_one_thread_decodes_and_a_host_program_keeps_its_settings(monkeypatch):
    given = []

    def spy(real):
        return lambda *arguments: given.append(arguments[1:]) or real(*arguments)

    codec = AvifImagePlugin._avif
    monkeypatch.setattr(codec, "AvifDecoder", spy(codec.AvifDecoder))
    monkeypatch.setattr(c_heif, "load_file", spy(c_heif.load_file))
    monkeypatch.setattr(AvifImagePlugin, "DEFAULT_MAX_THREADS", 7)
    options = {"DECODE_THREADS": 8, "DISABLE_SECURITY_LIMITS": True, "DEPTH_IMAGES": True}
    for name, value in options.items():
        monkeypatch.setattr(pillow_heif.options, name, value)
    decoded(avif(picture()))
    decoded(heic(picture()))
    assert failure(heic(picture()).replace(b"pitm", b"skip"))[0] == "corrupt"
    (_, threads), (heif_threads, *_, is_without_limits), _ = given
    assert (threads, heif_threads, is_without_limits) == (1, 0, False)
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 7
    assert {name: getattr(pillow_heif.options, name) for name in options} == options


def test_pillow_heif_is_imported_for_a_heic_alone_and_never_registered(tmp_path):
    for name, make in MAKERS.items():
        (tmp_path / name).write_bytes(make(picture()))
    code = (
        "import sys, pathlib\n"
        "from PIL import Image\n"
        "from resfeat.decoding import Picture, decode\n"
        "from resfeat.spec import Preprocessing\n"
        f"size = Preprocessing(**{asdict(PREPROCESSING)!r})\n"
        "of = lambda name: decode(pathlib.Path(name).read_bytes(), size, 'pillow')\n"
        "assert isinstance(of('AVIF'), Picture) and 'pillow_heif' not in sys.modules\n"
        "assert isinstance(of('HEIC'), Picture) and 'pillow_heif' in sys.modules\n"
        "assert 'HEIF' not in Image.OPEN and '.heic' not in Image.EXTENSION\n"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", MAKERS)
def test_room_is_asked_for_before_a_pixel_is_decoded(kind, monkeypatch):
    asked = []
    data = MAKERS[kind](picture())
    decode(data, PREPROCESSING, "pillow", lambda pixels: asked.append(pixels) or nullcontext())
    assert asked == [96 * 72]


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        ((b"avif", b"mif1", b"miaf"), "AVIF"),
        ((b"mif1", b"avif", b"miaf"), "AVIF"),
        ((b"avis", b"avif", b"msf1"), "AVIF"),
        ((b"heic", b"mif1", b"heic"), "HEIC"),
        ((b"mif1", b"heix"), "HEIC"),
        ((b"msf1", b"hevc", b"heic"), "HEIC"),
        ((b"mif1",), "HEIC"),
        ((b"isom", b"mp42"), None),
        ((b"qt  ",), None),
    ],
)
def test_brands_tell_which_it_is(brands, kind):
    ftyp = b"".join([b"ftyp", brands[0], bytes(4), *brands[1:]])
    box = (len(ftyp) + 4).to_bytes(4, "big") + ftyp
    assert kind_of(box + b"avif") == kind  # what stands behind the box is no brand


def test_names_of_these_need_no_second_look():
    assert not may_be_passed_over(["a.avif", "b.HEIC", "c.heif"])
    assert may_be_passed_over(["a.avif.txt"])


def test_kinds_of_what_is_too_short():
    assert [kind_of(b"\0\0\0\x20ftypheic"[:length]) for length in (0, 7, 11)] == [None] * 3
