"""What the tests share: real photographs, broken files, a checkpoint, and the command."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from broken import write_broken
from command import call, end_ray
from forked import start
from hostile import Outcomes, write_hostile
from hypothesis import settings
from photos import write_photos
from reference import torchvision_model

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Once = Callable[[str, Callable[[Path], object]], Path]

PHOTOS = 500

# Ray's workers give way to whatever else runs here, and would starve beside the other tests.
os.environ.setdefault("RAY_worker_niceness", "0")

# Nobody cuts the power here, and thousands of files would wait for the disk, some 10 ms each. What
# is synced, and when, test_store.py shows; processes that tests start do sync.
os.fsync = lambda descriptor: None

# How long an example takes depends on what runs beside it.
settings.register_profile("beside others", deadline=None)
settings.load_profile("beside others")


@pytest.hookimpl(tryfirst=True)  # xdist looks at the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What uses Ray is two groups, so that no three Rays fight for the cores, and comes first, as
    the longest; then the files, each a group, in the order of LONGEST."""
    for item in items:
        group = item.path.stem
        if _uses_ray(item):
            group = "a ray each" if group in OWN_RAY else "ray"
        item.add_marker(pytest.mark.xdist_group(group))
        # pytest-xdist 3.8 writes the group into `_nodeid`, which pytest 9.2 does not look at.
        if config.getoption("loadgroup", False) and hasattr(item, "_id"):
            item._id = type(item._id).parse(f"{item.nodeid}@{group}")
    items.sort(key=_place)


def _uses_ray(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return bool(item.get_closest_marker("ray") or (call and call.params.get("workers")))


# Where nearly every test that uses Ray starts one of its own, most of them to be killed. Each waits
# for it half of the time.
OWN_RAY = ("test_faults", "test_resume", "test_killers", "test_ray")

# Files that take long, longest first: the order in which they are begun.
LONGEST = (
    "test_faults",
    "test_object_store",
    "test_lease",
    "test_doctor",
    "test_resume",
    "test_killers",
    "test_slurm",
    "test_weights",
    "test_runtime",
    "test_update_stores",
    "test_features",
    "test_cli",
    "test_careful",
    "test_sources",
    "test_updates",
    "test_clouds",
    "test_run",
    "test_search",
    "test_partitions",
    "test_page",
    "test_int8",
    "test_hostile",
    "test_nightly",
    "test_resnet",
    "test_update",
    "test_parity",
    "test_kubernetes",
    "test_learning",
    "test_verify",
    "test_bench",
    "test_shard",
    "test_table",
    "test_retry_failed",
    "test_tar",
    "test_backbones",
)


def _place(item: pytest.Item) -> tuple[bool, int]:
    name = item.path.stem
    return not _uses_ray(item), LONGEST.index(name) if name in LONGEST else len(LONGEST)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder once for all processes of this session: `once("photos", write)` gives it, and
    has it written if that was not done. Not to be changed by who gets it."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def make(name: str, write: Callable[[Path], object]) -> Path:
        folder, done = common / "once" / name, common / "once" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with open(folder.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                write(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Of torch and FAISS: threads that wait for each other take up to a hundred times longer than
    one, where other tests take the cores."""
    import faiss  # noqa: F401 (only what is loaded is limited)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def photos(once: Once) -> Path:
    """500 real photographs as JPEG, PNG and WebP, in one subfolder a subject. Not to be changed."""
    quick = {"long_side": 400, "compress_level": 1}
    return once("photos", lambda folder: write_photos(folder, PHOTOS, **quick))


@pytest.fixture(scope="session")
def collection(photos: Path, once: Once) -> Path:
    """The photographs, nested deeper, with a dozen broken files among them. Not to be changed."""

    def write(folder: Path) -> None:
        for photo in sorted(photos.rglob("*.*")):
            place = folder / "some" / photo.parent.name / "deeper" / photo.name
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(photo, place)
        write_broken(folder / "some" / "chelsea")

    return once("collection", write)


@pytest.fixture(scope="session")
def hostile_files(once: Once) -> tuple[Path, dict[str, Outcomes]]:
    """A folder of hostile files, and what may come of each. Not to be changed."""

    def write(folder: Path) -> None:
        (folder / "files").mkdir()
        expected = write_hostile(folder / "files")
        (folder / "expected").write_bytes(pickle.dumps(expected))

    folder = once("hostile", write)
    return folder / "files", pickle.loads((folder / "expected").read_bytes())


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    """A torchvision ResNet-18 state dict with lively batch norms, as a .pth file."""

    def write(folder: Path) -> None:
        torch.save(torchvision_model("resnet18", seed=1).state_dict(), folder / "resnet18.pth")

    return once("weights", write) / "resnet18.pth"


@pytest.fixture(scope="session")
def resfeat() -> Iterator[Run]:
    """Run the command in this process: `resfeat("status", "out")` gives what a finished process
    gives. See command.py."""
    yield call
    end_ray()


@pytest.fixture(scope="session")
def command() -> Run:
    """The same in a process of its own, or a script that calls it, for what the process itself is
    about: kills, terminals, permissions, hooks, and a Ray that is started for one run."""

    def run(*arguments: object, env: dict[str, str] | None = None, script: Path | None = None):
        process = start(*arguments, env={**os.environ, **(env or {})}, script=script)
        told = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, *told)

    return run
