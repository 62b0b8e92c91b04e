"""The lock of a dataset on a disk. `test_lease.py` has the one in a store."""

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from resfeat.dataset import Layout
from resfeat.dataset import lock as locks
from resfeat.dataset.holding import _tidy, held
from resfeat.dataset.lock import holder, run_lock
from resfeat.dataset.writer import Writer
from resfeat.errors import ResfeatError
from resfeat.storage import file_system_of


@pytest.fixture
def here(tmp_path):
    """A dataset on a disk, and the same for another run that writes another share of it."""
    mine, other = Layout(tmp_path), Layout(tmp_path, share="other")
    for layout in (mine, other):
        for folder in layout.folders:
            folder.mkdir(parents=True, exist_ok=True)
    return mine, other


def test_a_run_that_was_killed_is_told_of_once_and_a_repair_leaves_word_of_it(here):
    layout, _ = here
    killed = Writer.me()
    layout.lock.write_text(killed.as_json())
    with run_lock(layout, is_run=False) as lock:
        assert lock.killed == killed
    with run_lock(layout) as lock:
        assert lock.killed == killed
    with run_lock(layout) as lock:
        assert lock.killed is None


def test_a_run_of_all_hears_of_a_partition_that_was_killed(here):
    layout, _ = here
    killed = Writer.me("2-of-4")
    (layout.lock.parent / killed.share).write_text(replace(killed, pid=2**22 + 1).as_json())
    with held(layout) as lock:
        assert lock.killed and lock.killed.share == "2-of-4"


def test_a_partition_leaves_the_drafts_of_others_alone_and_a_whole_run_clears_them(here):
    every, other = here
    mine = Layout(every.root, "1-of-2")
    mine.tmp.mkdir()
    for clears in (other, every):
        (other.tmp / "draft").touch()
        _tidy(mine)
        assert (other.tmp / "draft").exists()
        _tidy(clears)
        assert not (other.tmp / "draft").exists()


def test_runs_on_two_shares_hold_a_lock_each(here):
    layout, other = here
    with run_lock(layout), run_lock(other):
        refused = pytest.raises(ResfeatError, match=f"written by .*process {os.getpid()}")
        with refused, run_lock(other):
            pass
        assert holder(layout) and holder(other)
    assert not holder(layout)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_by_name(number, here, monkeypatch):
    """Lustre, where it is mounted without flock."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    layout, _ = here
    monkeypatch.setattr(locks.fcntl, "flock", flock)
    kind = file_system_of(layout.lock)
    message = f"{layout.lock} is on {kind}, which has no file locks.* mount it with flock"
    with pytest.raises(ResfeatError, match=message), run_lock(layout):
        pass
    assert re.fullmatch("[a-z0-9.]+", kind) and kind != file_system_of(Path("/proc/self"))
