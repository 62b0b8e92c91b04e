"""Memory does not grow with the number of shards: four times the images, the same peak."""

import json
import os
import subprocess
import sys

import pytest

# The real command on real images, of which the model gets to see 32 x 32 pixels, so that 25,000 of
# them take a minute. What is measured is the peak resident size of the driver and of its worker.
PROGRAM = """
import json, sys, threading, time
import psutil
from resfeat import ExtractSpec, RuntimeOptions, extract

source, output, workers = sys.argv[1:]
peak = {"driver": 0, "worker": 0}

def watch():
    while True:
        me = psutil.Process()
        peak["driver"] = max(peak["driver"], me.memory_info().rss)
        for child in me.children(recursive=True):
            try:
                if child.cmdline()[:1] == ["ray::resfeat-worker-1"]:
                    peak["worker"] = max(peak["worker"], child.memory_info().rss)
            except (psutil.NoSuchProcess, IndexError):
                pass
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
report = extract(ExtractSpec(
    sources=(source,), output=output, model="resnet18", weights="random:0", shard_size=128,
    resize=36, crop=32, runtime=RuntimeOptions(workers=int(workers)),
))
print(json.dumps({**peak, "items": report.items, "embedded": report.embedded}))
"""


@pytest.fixture(scope="module")
def sources(photos, tmp_path_factory):
    """5,000 and 20,000 small images: hard links to a hundred thumbnails of the photographs."""
    from PIL import Image

    thumbnails = []
    for photo in sorted(photos.rglob("*.*"))[::5]:
        path = tmp_path_factory.mktemp("thumbnails") / "small.jpg"
        with Image.open(photo) as image:
            image.convert("RGB").resize((64, 48)).save(path)
        thumbnails.append(path)
    folders = {}
    for count in (5_000, 20_000):
        folders[count] = tmp_path_factory.mktemp(f"small{count}")
        for number in range(count):
            os.link(thumbnails[number % len(thumbnails)], folders[count] / f"{number:06d}.jpg")
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "process"), [(0, "driver"), (1, "driver"), (1, "worker")])
def test_the_peak_is_that_of_a_quarter_of_the_images(workers, process, sources, tmp_path):
    peaks = {}
    for count, source in sources.items():
        command = [sys.executable, "-c", PROGRAM, source, tmp_path / str(count), workers]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["items"] == told["embedded"] == count
        peaks[count] = told[process]
    print({count: f"{peak / 2**20:.0f} MiB" for count, peak in peaks.items()})
    assert 0 < peaks[20_000] <= 1.1 * peaks[5_000]
