"""Decoding in children: what crashes, hangs or swallows memory is one failure, and no more."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from broken import encode
from PIL import Image
from seams import TREACHEROUS, after_import

from resfeat.backbones.ours import IMAGENET
from resfeat.decoding import CarefulDecoder, Picture, careful, decode
from resfeat.errors import Failure, ResfeatError


@pytest.fixture
def treacherous(monkeypatch, tmp_path):
    environment = after_import({"resfeat.decoding.decode": TREACHEROUS}, tmp_path / "hook")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    monkeypatch.setattr(careful, "SECONDS", 1.0)


@pytest.fixture(scope="module")
def photo():
    return encode(Image.effect_noise((320, 240), 60).convert("RGB"), "JPEG")


def children():
    """Decoders; other tests of this process have children of their own."""
    every = psutil.Process().children()
    return [child for child in every if child.name() == "resfeat-decoder"]


@pytest.mark.parametrize("way", ["turbo", "pillow"])
def test_a_good_image_has_the_pixels_that_it_has_without(way, photo):
    expected = decode(photo, IMAGENET, way)
    with CarefulDecoder(1) as decoder:
        given = decoder.decode(photo, IMAGENET, way)
    assert isinstance(given, Picture) and np.array_equal(given.pixels, expected.pixels)
    assert (given.width, given.height) == (320, 240)


@pytest.mark.parametrize(
    ("end", "reason", "words"),
    [
        (b"crash", "decoder_crash", "Segmentation fault"),
        (b"exit", "decoder_crash", "exit code 3"),
        (b"hang", "timeout", "not decoded within 1 s"),
        (b"spin", "timeout", "not decoded within 1 s"),
        (b"swallow", "out_of_memory", "not enough memory"),
    ],
)
def test_what_kills_a_child_is_told_and_the_next_image_is_decoded(
    end, reason, words, photo, treacherous
):
    with CarefulDecoder(1) as decoder:
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
        failure = decoder.decode(photo + end, IMAGENET, "pillow")
        assert isinstance(failure, Failure) and words in failure.message
        assert (failure.stage, failure.reason) == ("decode", reason)
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
    assert not children()


def test_a_broken_image_is_the_failure_that_it_is_without(photo):
    broken = photo[: len(photo) // 2]
    with CarefulDecoder(1) as decoder:
        assert decoder.decode(broken, IMAGENET, "pillow") == decode(broken, IMAGENET, "pillow")


def test_a_child_that_is_killed_while_it_waits_is_no_images_fault(photo):
    with CarefulDecoder(1) as decoder:
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
        (child,) = children()
        child.kill()
        child.wait()
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)


def test_a_child_is_kept_until_an_image_kills_it(photo, treacherous):
    with CarefulDecoder(1) as decoder:
        decoder.decode(photo, IMAGENET, "pillow")
        (first,) = children()
        decoder.decode(photo, IMAGENET, "pillow")
        assert children() == [first]
        decoder.decode(photo + b"crash", IMAGENET, "pillow")
        assert not children()
        decoder.decode(photo, IMAGENET, "pillow")
        assert children() != [first]


def test_a_child_does_not_outlive_who_made_it(photo, treacherous):
    """Not even one that hangs: nobody would be left to end it."""
    script = (
        "import os, signal, sys, threading, time\n"
        "from resfeat.decoding import careful\n"
        "from resfeat.backbones.ours import IMAGENET\n"
        "careful.SECONDS = 2.0\n"
        "decoder = careful.CarefulDecoder(1)\n"
        "data = bytes.fromhex(sys.argv[1])\n"
        "threading.Thread(target=decoder.decode, args=(data, IMAGENET, 'pillow')).start()\n"
        "time.sleep(3600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, (photo[:4] + b"hang").hex()])
    deadline = time.monotonic() + 30
    while not (below := psutil.Process(process.pid).children()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(child.is_running() for child in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_children_leave_no_descriptor_open(photo, treacherous):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    for _ in range(3):
        with CarefulDecoder(1) as decoder:
            decoder.decode(photo + b"crash", IMAGENET, "pillow")
            decoder.decode(photo, IMAGENET, "pillow")
    assert opened() == before


def test_no_module_of_the_folder_that_the_run_is_started_in_is_run(photo, tmp_path, monkeypatch):
    """It may be a folder of strangers' files."""
    for name in ("queue", "random", "numpy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    with CarefulDecoder(1) as decoder:
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
    assert not (tmp_path / "ran").exists()


def test_a_child_that_cannot_start_is_no_failure_of_an_image(photo, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with CarefulDecoder(1) as decoder, pytest.raises(ResfeatError, match="could not be started"):
        decoder.decode(photo, IMAGENET, "pillow")
    assert not children()


def test_a_limit_of_the_system_is_kept(photo):
    """Who may have no more memory than so much still decodes."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (3 * 1024**3,) * 2)\n"
        "from resfeat.backbones.ours import IMAGENET\n"
        "from resfeat.decoding.careful import CarefulDecoder\n"
        "with CarefulDecoder(1) as decoder:\n"
        "    print(type(decoder.decode(sys.stdin.buffer.read(), IMAGENET, 'pillow')).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=photo, capture_output=True)
    assert done.stdout.strip() == b"Picture", done.stderr


def test_a_child_that_idles_for_longer_than_an_image_may_take_goes_on(photo, monkeypatch):
    monkeypatch.setattr(careful, "SECONDS", 1.0)
    with CarefulDecoder(1) as decoder:
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
        (child,) = children()
        time.sleep(1.5)
        assert isinstance(decoder.decode(photo, IMAGENET, "pillow"), Picture)
        assert children() == [child]


@pytest.mark.parametrize("is_used", [True, False])
def test_a_decoder_that_is_closed_says_so_at_once(photo, is_used):
    with CarefulDecoder(1) as decoder:
        if is_used:
            decoder.decode(photo, IMAGENET, "pillow")
    for _ in range(2):
        with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="is closed"):
            pool.submit(decoder.decode, photo, IMAGENET, "pillow").result(timeout=10)
    assert not children()


def test_a_child_that_is_busy_when_its_decoder_is_closed_is_ended_after_its_image(
    photo, treacherous
):
    """And whoever waits for it is told."""
    with ThreadPoolExecutor(2) as pool:
        with CarefulDecoder(1) as decoder:
            busy = pool.submit(decoder.decode, photo + b"hang", IMAGENET, "pillow")
            while not children():
                time.sleep(0.05)
            waits = pool.submit(decoder.decode, photo, IMAGENET, "pillow")
        assert busy.result(timeout=60).reason == "timeout"
        with pytest.raises(ValueError, match="is closed"):
            waits.result(timeout=10)
    assert not children()


def test_a_fault_of_our_own_is_no_crash_of_the_decoder(photo, monkeypatch, tmp_path):
    broken = "def _resized(*arguments):\n    raise TypeError('ours')\n"
    environment = after_import({"resfeat.decoding.resize": broken}, tmp_path / "hook")
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    with CarefulDecoder(1) as decoder, pytest.raises(ResfeatError, match="TypeError: ours"):
        decoder.decode(photo, IMAGENET, "pillow")
