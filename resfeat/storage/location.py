"""Where a file or folder is: on a disk, a `pathlib.Path`, or in a store, a `StorePath`."""

import errno
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from resfeat.errors import UsageError
from resfeat.storage.clouds import KNOWN, is_remote, split
from resfeat.storage.remote import StorePath

# With one slash: what a Path makes of an address.
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|(s3|gs|az|https?):/")

Location = Path | StorePath


def locate(name: str | os.PathLike[str]) -> Location:
    """The file or folder of this name: an absolute path, or an object of an address in a store.
    Raises UsageError for any other address, which a path would make a local folder of."""
    if not is_remote(name):
        if ADDRESS.match(str(name)):
            raise UsageError(f"'{name}' is no address that we know: give {KNOWN}")
        return Path(name).absolute()
    root, key = split(str(name))
    path = PurePosixPath(key)
    if root.endswith(("/", "@")) or path.is_absolute() or ".." in path.parts:
        raise UsageError(f"'{name}' is no address of an object: give {KNOWN}")
    return StorePath(root, path)


def remove_all(folder: Location) -> None:
    """Remove a folder on a disk and all that is in it, if it is there."""
    shutil.rmtree(str(folder), ignore_errors=True)


def make_folder(location: Location) -> None:
    """Make a folder, durably, if it is not there."""
    if isinstance(location, Path) and not location.exists():
        location.mkdir(exist_ok=True)
        sync(location.parent)


def remove(location: Location) -> None:
    """Remove a file, durably, if it is there."""
    location.unlink(missing_ok=True)
    if isinstance(location, Path) and location.parent.exists():
        sync(location.parent)


def file_system_of(path: Path) -> str:
    """The kind of file system that a path lies on, such as "ext4", by Linux's list of mounts."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "a file system"
    there = [(place, kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(there, key=lambda mount: len(mount[0]))[1] if there else "a file system"


def sync(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot do it to a folder. A power cut may then cost the last commits,
        # which are done again.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
