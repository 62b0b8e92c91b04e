"""The pixel policy, case by case, on pictures made here."""

import importlib
import io
import struct
import subprocess
import sys
import warnings

import numpy as np
import pytest
from broken import EXPECTED, write_broken
from containers import heic
from later import Later
from PIL import Image, ImageFile

from resfeat.decoding import Loaded, Picture, load, quiet, resize
from resfeat.errors import REASONS, Failure, ResfeatError
from resfeat.sources import item_of, read
from resfeat.spec import Preprocessing

models = Later("torchvision.models")
F = Later("torchvision.transforms.functional")

module = importlib.import_module("resfeat.decoding.decode")  # its function has the same name
PREPROCESSING = Preprocessing(
    resize=232,
    crop=224,
    interpolation="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture(params=["turbo", "pillow"], autouse=True)
def way(request, monkeypatch):
    """What is promised holds for both ways of decoding, unless a test says otherwise."""
    monkeypatch.setattr(module, "WAY", request.param, raising=False)
    return request.param


def decode(data, way=None):
    return module.decode(data, PREPROCESSING, way or module.WAY)


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(picture, kind="PNG", **options) -> Picture:
    result = decode(encoded(picture, kind, **options))
    assert isinstance(result, Picture), result
    return result


def gradient(width=320, height=240):
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    red, green = x * 255 // width, y * 255 // height
    return Image.fromarray(np.dstack([red, green, np.full_like(red, 90)]).astype(np.uint8))


def torchvisions_pixels(image):
    transforms = models.ResNet50_Weights.DEFAULT.transforms()
    resized = F.resize(image.convert("RGB"), transforms.resize_size)
    return np.asarray(F.center_crop(resized, transforms.crop_size))


def test_pixels_are_torchvisions_to_the_last_bit(photos):
    for path in sorted(photos.rglob("*.*"))[::10]:
        ours = decode(path.read_bytes(), "pillow")
        with Image.open(path) as image:
            assert np.array_equal(ours.pixels, torchvisions_pixels(image))
            assert (ours.width, ours.height) == image.size


def test_turbo_pixels_are_two_levels_away_at_most_where_nothing_is_scaled(photos):
    for path in sorted(photos.rglob("*.*"))[::10]:
        turbo, pillow = (decode(path.read_bytes(), way) for way in ("turbo", "pillow"))
        assert (turbo.width, turbo.height) == (pillow.width, pillow.height)
        difference = np.abs(turbo.pixels.astype(int) - pillow.pixels)
        assert difference.max() <= 2 and difference.mean() < 0.03


@pytest.mark.parametrize("turn", range(9))
def test_large_jpegs_are_scaled_while_they_are_decoded(photos, turn, monkeypatch):
    """Nearly the same pixels, right way up, from half of the rows and columns."""
    decoded_sizes = []

    def spy(*args, **options):
        given = decode_jpeg(*args, **options)
        decoded_sizes.append(given.shape[:2])
        return given

    decode_jpeg = module.simplejpeg.decode_jpeg
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", spy)
    with Image.open(sorted(photos.rglob("*.png"))[0]) as photo:
        large = photo.convert("RGB").resize((2000, 1500), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(large, "JPEG", quality=90, exif=exif)
    turbo, pillow = (decode(data, way) for way in ("turbo", "pillow"))
    assert decoded_sizes == [(750, 1000)]  # a quarter would be less than 2 x 232 rows
    expected = (1500, 2000) if turn >= 5 else (2000, 1500)
    assert (turbo.width, turbo.height) == (pillow.width, pillow.height) == expected
    difference = np.abs(turbo.pixels.astype(int) - pillow.pixels)
    assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.parametrize("size", [(1919, 1920), (1920, 1919), (927, 930), (3000, 1856)])
def test_a_turned_jpeg_that_is_scaled_keeps_its_size(size):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(gradient(*size), "JPEG", exif=exif)
    turbo, pillow = (decode(data, way) for way in ("turbo", "pillow"))
    assert (turbo.width, turbo.height) == (pillow.width, pillow.height) == size[::-1]
    assert np.abs(turbo.pixels.astype(int) - pillow.pixels).max() <= 4


def test_the_first_picture_of_several_in_a_jpeg_is_turbo_too(monkeypatch):
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient().rotate(180)])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    expected = decode(encoded(gradient(), "JPEG"), "turbo").pixels
    monkeypatch.setattr(Image.Image, "load", None)  # Pillow is not to decode it
    assert np.array_equal(decode(data, "turbo").pixels, expected)


def test_what_libjpeg_only_warns_of_is_left_to_pillow(photos):
    data = encoded(gradient(), "JPEG")
    junk = data[:-2] + b"junk!" + data[-2:]
    with pytest.raises(ValueError):
        module.simplejpeg.decode_jpeg(junk)
    assert np.array_equal(decode(junk).pixels, decode(data).pixels)


def test_only_the_middle_of_a_very_long_picture_is_sampled(photos):
    with Image.open(sorted(photos.rglob("*.png"))[0]) as photo:
        for size in ((photo.width, photo.height // 12), (photo.width // 12, photo.height)):
            strip = photo.crop((0, 0, *size))
            difference = np.abs(decoded(strip).pixels.astype(int) - torchvisions_pixels(strip))
            assert difference.max() <= 2
            assert difference.mean() < 0.3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_every_format_is_read_by_content(kind):
    picture = decoded(gradient(), kind)
    assert picture.pixels.shape == (224, 224, 3)
    assert picture.pixels.dtype == np.uint8
    expected = decoded(gradient()).pixels.astype(int)
    assert np.abs(picture.pixels - expected).mean() < (8 if kind == "GIF" else 3)


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    upright = gradient()
    if orientation in TURNS:
        upright = upright.transpose(TURNS[orientation])
    picture = decoded(gradient(), exif=exif)
    assert (picture.width, picture.height) == upright.size
    assert np.array_equal(picture.pixels, decoded(upright).pixels)


def test_alpha_is_composited_on_white():
    half_clear = gradient().convert("RGBA")
    half_clear.putalpha(128)
    expected = 255 - (255 - decoded(gradient()).pixels.astype(int)) * 128 / 255
    assert np.abs(decoded(half_clear).pixels - expected).max() <= 2
    assert decoded(Image.new("LA", (9, 9), (0, 0))).pixels.min() == 255
    assert decoded(Image.new("RGB", (9, 9), (1, 2, 3)), transparency=(1, 2, 3)).pixels.min() == 255
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([10, 20, 30])
    assert tuple(decoded(palette).pixels[0, 0]) == (10, 20, 30)
    assert decoded(palette, transparency=0).pixels.min() == 255


def test_grey_becomes_three_equal_channels():
    pixels = decoded(gradient().convert("L")).pixels
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert set(np.unique(decoded(Image.new("1", (9, 9), 1)).pixels)) == {255}


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    wide = np.linspace(0, 65535, 300 * 300).astype(np.uint16).reshape(300, 300)
    pixels = decoded(Image.fromarray(wide)).pixels
    expected = decoded(Image.fromarray(np.rint(wide / 257).astype(np.uint8))).pixels
    assert np.array_equal(pixels, expected)
    assert pixels.max() < 255 and 120 < pixels.mean() < 135


def test_sixteen_bit_grey_where_white_is_zero_or_a_value_is_clear():
    wide = np.full((9, 9), 6000, np.uint16)
    inverted = decoded(Image.fromarray(wide), "TIFF", tiffinfo={262: 0}).pixels
    assert set(np.unique(inverted)) == {255 - 23}
    wide[:, 5:] = 300
    assert decoded(Image.fromarray(wide), transparency=6000).pixels[0, 0, 0] == 255
    assert decoded(Image.fromarray(wide), transparency=300).pixels[0, 0, 0] == 23


def test_the_white_of_a_12_bit_tiff_is_white():
    packed = b"\xff\xf0\x00" * 50  # two pixels in three bytes: 4095, 0
    tags = [(256, 4, 10), (257, 4, 10), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, 10), (279, 4, len(packed))]
    directory = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags
    )
    data = struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed
    data += struct.pack("<H", len(tags)) + directory + bytes(4)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I;16" and image.getpixel((0, 0)) == 4095
    pixels = decode(data).pixels
    assert pixels.max() == 255 and pixels.min() == 0


def test_a_picture_of_one_to_two_is_resized_in_the_order_of_torchvision():
    """Pillow 13 shrinks the rows first only of what is more than twice as tall as wide."""
    noise = np.random.default_rng(0).integers(0, 256, (1200, 600, 3), np.uint8)
    picture = Image.fromarray(noise)
    assert np.array_equal(decode(encoded(picture), "pillow").pixels, torchvisions_pixels(picture))


def test_cmyk_is_converted_as_pillow_does():
    cmyk = gradient().convert("CMYK")
    expected = Image.open(io.BytesIO(encoded(cmyk, "TIFF"))).convert("RGB")
    assert np.array_equal(decoded(cmyk, "TIFF").pixels, decoded(expected).pixels)


def test_pixels_without_a_fixed_range_are_refused():
    for mode in ("F", "I"):
        failure = decode(encoded(Image.new(mode, (9, 9)), "TIFF"))
        assert isinstance(failure, Failure) and failure.reason == "format_not_allowed"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (50, 50), colour) for colour in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "AVIF"):
        picture = decoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(picture.pixels[0, 0].astype(int) - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("size", [(1, 1), (60_000, 3), (3, 60_000), (223, 225)])
def test_any_shape_is_embedded(size):
    picture = decoded(Image.new("RGB", size, (50, 100, 150)), "PNG")
    assert (picture.width, picture.height) == size
    assert np.abs(picture.pixels.astype(int) - (50, 100, 150)).max() <= 1


def test_broken_files_have_the_reason_that_fits(tmp_path):
    write_broken(tmp_path)
    given = {}
    for name in EXPECTED:
        content = read(item_of(str(tmp_path / name)))
        failure = content if isinstance(content, Failure) else decode(content[0])
        assert isinstance(failure, Failure), name
        assert failure.reason in REASONS
        given[name] = failure.stage, failure.reason
    assert given == EXPECTED


def test_a_host_program_that_loads_truncated_images_changes_nothing(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    half = encoded(gradient(), "JPEG")[:2000]
    assert decode(half).reason == "truncated"


def test_every_prefix_and_any_flipped_byte_is_an_answer_and_not_an_exception():
    """Real decoders on 900 damaged files: each a picture or a failure of the closed list."""
    chance = np.random.default_rng(0)
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
    files = [encoded(gradient(64, 48), kind) for kind in kinds]
    for whole in (*files, heic(gradient(64, 48)), heic(gradient(130, 70), tile_size=64)):
        damaged = [whole[: len(whole) * n // 50] for n in range(50)]
        for _ in range(50):
            flipped = bytearray(whole)
            for place in chance.integers(0, len(whole), 3):
                flipped[place] ^= 1 << int(chance.integers(8))
            damaged.append(bytes(flipped))
        for data in damaged:
            result = decode(data)
            assert isinstance(result, Picture) or result.reason in REASONS


def test_a_formats_code_does_not_run_unless_it_is_allowed(monkeypatch):
    opened = []
    for name in ("EPS", "PSD", "ICO"):
        _, accept = Image.OPEN[name]
        spy = lambda *args, name=name: opened.append(name)  # noqa: E731
        monkeypatch.setitem(Image.OPEN, name, (spy, accept))
    for data in (
        b"%!PS-Adobe-3.0\n",
        b"8BPS" + bytes(30),
        struct.pack("<HHH", 0, 1, 1) + bytes(30),
    ):
        assert decode(data).reason == "format_not_allowed"
    assert opened == []


def test_a_fault_of_our_own_ends_the_run_and_blames_no_image(monkeypatch):
    def broken(*arguments):
        raise TypeError("ours")

    data = encoded(gradient())
    monkeypatch.setattr(resize, "_resized", broken)
    with pytest.raises(ResfeatError, match=r"resfeat itself failed .*TypeError: ours.*report it"):
        decode(data)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, struct.error])
def test_whatever_pillow_raises_is_the_images_fault(error, monkeypatch):
    def broken(*arguments):
        raise error("theirs")

    data = encoded(gradient(), "TIFF")
    monkeypatch.setattr(Image.Image, "getexif", broken)
    assert decode(data).reason == "corrupt"


def test_memory_that_torch_does_not_get_is_a_failure(monkeypatch, way):
    def short(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(resize, "_resized", short)
    assert decode(encoded(gradient())).reason == "out_of_memory"


def test_one_call_leads_from_an_item_to_a_picture_or_a_failure(tmp_path):
    """With what it was when it was read; nothing is decoded of what cannot be read."""
    (tmp_path / "a.png").write_bytes(encoded(gradient()))
    (tmp_path / "b.png").write_bytes(b"no image")
    good, bad, gone = (item_of(str(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    loaded = load(good, PREPROCESSING, "pillow")
    assert isinstance(loaded, Loaded)
    status = (tmp_path / "a.png").stat()
    assert (loaded.size, loaded.mtime) == (status.st_size, status.st_mtime_ns // 1000)
    assert np.array_equal(loaded.picture.pixels, decode(encoded(gradient()), "pillow").pixels)
    assert load(bad, PREPROCESSING, "pillow").stage == "decode"
    assert load(gone, PREPROCESSING, "pillow").stage == "read"


def test_warnings_are_left_as_they_are_but_for_pillows_in_a_run_of_ours():
    code = (
        "import warnings\n"
        "from resfeat.decoding import quiet\n"
        "from PIL import Image\n"
        "before, large = list(warnings.filters), Image.DecompressionBombWarning\n"
        "assert not any('PIL' in repr(each) for each in before), before\n"
        "with quiet():\n"
        "    warnings.warn('large', large)\n"
        "assert warnings.filters == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_large_picture_is_no_failure_where_warnings_are_errors(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 320 * 240 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(gradient())).reason == "corrupt"
        with quiet():
            assert isinstance(decode(encoded(gradient())), Picture)
