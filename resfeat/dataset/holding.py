"""The output folder, held by one run: by itself, or as one of several that share a dataset.

    a whole run     holds the lock "all", and has seen that nobody holds one of a partition
    a partition     holds its own lock, "2-of-4", has seen that none of another count is held, and
                    holds "all" while it writes what is everybody's: the plan, and the record

Each takes its own lock before it looks at those of others, so of two that begin together at least
one sees the other. It also looks before it takes any: what is refused in good time leaves no trace,
and is in nobody's way. A run leaves drafts and, where it comes to nothing, folders; it clears its
own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from resfeat.dataset.layout import ALL, Layout
from resfeat.dataset.lock import refusal, run_lock
from resfeat.dataset.writer import HeldError, Lock, Writer
from resfeat.errors import ResfeatError, Stopped
from resfeat.plan import Partition
from resfeat.storage import remove_all

WAIT_SECONDS = 0.5  # between two looks at whether another has made the plan

Note = Callable[[str], None]


@contextmanager
def held(layout: Layout, on_wait: Note = lambda why: None) -> Iterator[Lock]:
    """The output folder, made if it is not there, with the lock of this share of it held.

    Where it ends without a record, what it made is removed again; but nothing in a store, where a
    request to remove the plan may arrive when it is that of another run, which writes over it, and
    nothing that others share. on_wait: is told before it takes long. Raises ResfeatError, naming
    the holder, where another writes there.
    """
    root = layout.root
    _check_alone(layout)
    with writable(layout):
        parents = [root, *root.parents] if isinstance(root, Path) else []
        made = [folder for folder in parents if not folder.exists()]
        try:
            for folder in layout.folders:
                folder.mkdir(parents=True, exist_ok=True)
            with run_lock(layout, on_wait=on_wait) as lock:
                lock.killed = see_alone(layout, on_wait) or lock.killed
                try:
                    _tidy(layout)  # of what a killed run left
                    yield lock
                finally:
                    if lock.is_held():  # else it is another's
                        _tidy(layout)  # of what workers left that were killed or stopped
                        if layout.is_on_disk and layout.share == ALL and not layout.spec.exists():
                            remove_all(layout.private)
                            layout.card.unlink(missing_ok=True)
                            _remove_empty([Path(str(layout.embeddings)), *made])
        except OSError:
            _remove_empty(made)
            raise


@contextmanager
def whole(
    layout: Layout,
    on_wait: Note = lambda why: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Layout]:
    """The dataset as one whole, to write what all its shares have in common; waits for another
    share that does so. Raises ResfeatError, naming it, where a run writes all of it, and Stopped.
    """
    if layout.share == ALL:
        yield layout
        return
    every, told = Layout(str(layout.root)), set[str]()

    def tell(why: str) -> None:
        if why not in told:
            told.add(why)
            on_wait(why)

    with ExitStack() as stack:
        while True:
            try:
                lock = run_lock(every, is_run=False, on_wait=tell, share=layout.share)
                stack.enter_context(lock)
                break
            except HeldError as error:
                # No name, or that of one that is gone: another is just taking it, or giving it up.
                writer = error.writer
                if writer and writer.is_alive() is not False:
                    if writer.share == ALL:
                        raise
                    tell(f"waiting for {writer}, which writes down what all partitions go by")
            if stopping():
                raise Stopped("stopped while another run was listing")
            time.sleep(WAIT_SECONDS)
        if isinstance(every.tmp, Path):
            every.tmp.mkdir(exist_ok=True)
            _clear(every.tmp)  # of a partition that was killed while it listed
        yield every


@contextmanager
def writable(layout: Layout) -> Iterator[None]:
    """Say of what goes wrong with the output's folders what can be done about it."""
    try:
        yield
    except OSError as error:
        raise ResfeatError(
            f"cannot write to {layout.root}: {error.strerror or error}; give a folder that can be "
            "written, with space left, and the same command again"
        ) from error


def _check_alone(layout: Layout) -> None:
    """Raise HeldError, naming the holder, where another is known to write what is ours, too."""
    for other in _others(layout):
        if (writer := other.writer) and _is_there(writer, layout) and _meets(writer.share, layout):
            raise other


def is_alone(layout: Layout) -> bool:
    """Whether nobody holds another share than ours."""
    return not any(_others(layout))


def _others(layout: Layout) -> Iterator[HeldError]:
    """Who holds another share than ours, or may do so, as a run of it would be told."""
    for share in sorted({ALL, *layout.shares()} - {layout.share}):
        found = refusal(Layout(str(layout.root), share))
        if found and not (found.writer and found.writer.share == layout.share):
            yield found


def _meets(share: str, layout: Layout) -> bool:
    """Whether another share has what is in ours, but for our own."""
    other, mine = Partition.of_share(share), Partition.of_share(layout.share)
    return other is None or mine is None or other.of != mine.of


def _is_there(writer: Writer, layout: Layout) -> bool:
    """Whether one that holds a lock is certainly there. On a disk only a process can hold it, but
    there the name may be that of the last one; in a store the name is all there is."""
    is_alive = writer.is_alive()
    return is_alive is not False if layout.is_on_disk else is_alive is True


def see_alone(layout: Layout, on_wait: Note, *, is_run: bool = True) -> Writer | None:
    """See that nobody writes what is ours, too: raises ResfeatError, naming the holder. Returns who
    held such a share last, if that run was killed. is_run, on_wait: as `run_lock` has them."""
    killed = None
    for share in layout.shares():
        other = Layout(str(layout.root), share)
        if share not in (ALL, layout.share) and _meets(share, layout):
            with run_lock(other, is_run=is_run, on_wait=on_wait) as lock:
                killed = killed or lock.killed
    return killed


def _tidy(layout: Layout) -> None:
    """Remove the drafts of this share of the dataset, which no run is writing any more."""
    if isinstance(layout.tmp, Path):
        _clear(layout.tmp.parent if layout.share == ALL else layout.tmp)


def _clear(drafts: Path) -> None:
    for leftover in drafts.rglob("*"):
        if not leftover.is_dir():
            leftover.unlink(missing_ok=True)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
