"""Tars (WebDataset): listed by their headers; `members` reads what is in them.

Only regular members hold an image. A link, and a file that is stored sparse, becomes an item that
is known to fail. Folders and devices are passed over, and so are hidden members and sidecars, which
are counted. Members of one key need not lie together. Their names are ids, and nothing else.

Of a damaged tar, what is whole is listed. One item, which is known to fail, stands for each place
that is damaged.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from tarfile import TarInfo
from threading import Event
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pyarrow as pa

from resfeat.sources import directory, rules
from resfeat.sources.ahead import AT_ONCE, Ahead
from resfeat.sources.headers import Damage, File, headers
from resfeat.sources.item import BEAT, BEAT_SECONDS, Item, problem, table_of, whole
from resfeat.sources.windowed import DAMAGED, MOST_BYTES, Unzipped, Windowed, opened
from resfeat.spec import SourceOptions
from resfeat.storage import StorePath, is_remote

# Listed at a time. On a disk few would do; in a store each waits for its requests.
TARS_AHEAD = 16
TABLE = 8192
PIECE = 16 * 1024**2
_CUT = problem("bad_container", "the tar ends within it, or is damaged there")
_LINKS = {tarfile.SYMTYPE: "symbolic", tarfile.LNKTYPE: "hard"}


class Tars:
    """Some tars; see `listing.Part`.

    `options.keep` names extensions: images carry what is in the member of their key that has this
    extension, as a string, unchanged. The key is a name up to the first dot of its last part. They
    carry null where no member has it, where it is not UTF-8, or has more than 1 MiB. Of several,
    the last counts.
    """

    def __init__(self, roots: Sequence[str], base: str, options: SourceOptions) -> None:
        """roots: absolute paths, or URIs, sorted. base: what the ids leave out of them."""
        self.carried = tuple(pa.field(name, pa.string()) for name in options.keep)
        self.skipped = Counter[str]()
        self._roots, self._base, self._options = roots, base, options

    def tables(self) -> Iterator[pa.Table]:
        """In the order of the tars. Meanwhile the next table of each of the next tars is made."""
        self.skipped.clear()
        ended = Event()
        aside = ThreadPoolExecutor(AT_ONCE, "headers")  # threads start as they are needed
        with aside, ThreadPoolExecutor(TARS_AHEAD, "list") as pool:
            try:
                yield from self._in_order(pool, aside, ended)
            finally:
                ended.set()

    def _in_order(self, pool: Executor, aside: Executor, ended: Event) -> Iterator[pa.Table]:
        names = ((root, root.removeprefix(self._base)) for root in self._roots)
        tars = (_Tar(root, name, self._options, ended) for root, name in names)
        ahead = deque[tuple[_Tar, Iterator[pa.Table], Future[pa.Table | None]]]()
        while True:
            while len(ahead) < TARS_AHEAD and (tar := next(tars, None)):
                tables = tar.tables(self.carried, aside)
                ahead.append((tar, tables, pool.submit(next, tables, None)))
            if not ahead:
                return
            tar, tables, made = ahead.popleft()
            while wait([made], BEAT_SECONDS).not_done:
                yield BEAT
            if (table := made.result()) is None:
                self.skipped += tar.skipped
                continue
            ahead.appendleft((tar, tables, pool.submit(next, tables, None)))
            yield table


class _Tar:
    """One tar that is being listed. ended: once nobody wants more of it."""

    def __init__(self, root: str, name: str, options: SourceOptions, ended: Event) -> None:
        self.skipped, self._ended = Counter[str](), ended
        self._name, self._uri = name, _uri_of(root)
        self._labelled = options.label_from == "parent"
        self._keep = [extension.lower() for extension in options.keep]
        self._times: dict[str, int] = {}  # by name: how often a member had it
        self._beside: dict[tuple[str, str], str | None] = {}  # by key and extension

    def tables(self, carried: Sequence[pa.Field], aside: Executor) -> Iterator[pa.Table]:
        items, keys, is_zipped = list[Item](), list[str](), False
        try:
            with opened(self._uri) as tar:
                file, is_zipped = tar.file, isinstance(tar.file, Unzipped)
                # What is kept lies between the headers, so that all is streamed.
                if isinstance(file, Windowed) and is_remote(self._uri) and not self._keep:
                    file = Ahead(file, aside)
                for key, item in self._items(file):
                    items.append(item._replace(mtime=tar.mtime, etag=tar.etag))
                    keys.append(key)
                    if len(items) == TABLE and not (self._keep or is_zipped):
                        yield table_of(items)
                        items, keys = [], []
        except OSError as error:
            why = directory.failure(error)
            # What it has before that is listed all the same.
            items.append(self._item("", problem=problem(why.reason, why.message)))
            keys.append("")
        if self._keep:
            items = [self._carrying(*both) for both in zip(items, keys, strict=True)]
        if items and is_zipped:
            yield whole(table_of(items, carried))
            return
        for start in range(0, len(items), TABLE):
            yield table_of(items[start : start + TABLE], carried)

    def _items(self, file: File) -> Iterator[tuple[str, Item]]:
        """Keys and items. No item has what it carries, since that may come later."""
        is_sound = True
        for found in headers(file):
            if self._ended.is_set():
                return
            if found is None:
                continue
            if isinstance(found, Damage):
                is_sound = False
                told = problem("bad_container", found.message)
                yield "", self._item("", offset=found.place, problem=told)
                continue
            key, extension = _key(found.name)
            if extension in self._keep and found.isreg() and not found.issparse():
                self._beside[key, extension] = _text(file, found)
            elif item := self._of(file, found):
                yield key, item
                if item.problem == _CUT:
                    return
        if is_sound and isinstance(file, Unzipped) and not file.ends_well():
            told = problem("bad_container", "its checksum is wrong: images may be damaged, too")
            yield "", self._item("", offset=file.tell(), problem=told)

    def _of(self, file: File, member: TarInfo) -> Item | None:
        """The item of a member, if it is to be one."""
        link, why = _LINKS.get(member.type), None
        if not link and not member.isreg():
            return None
        if kind := _passed_over(member.name):
            self.skipped[kind] += 1
            return None
        if link:
            why = f"a {link} link to {rules.printable(member.linkname)}: links are not followed"
        elif member.issparse():
            why = "it is stored sparse: write the tar again without --sparse"
        elif not self._reaches(file, member.offset_data + member.size):
            return self._item(member.name, offset=member.offset_data, problem=_CUT)
        told = problem("bad_container", why) if why else None
        size = None if why else member.size
        return self._item(member.name, size=size, offset=member.offset_data, problem=told)

    def _reaches(self, file: File, end: int) -> bool:
        """Whether the file has so many bytes. What is compressed is read up to there: piece by
        piece, for it may take long."""
        if isinstance(file, Unzipped):
            for place in range(file.tell(), end, PIECE):
                if self._ended.is_set() or not file.reaches(place):
                    return False
        return file.reaches(end)

    def _item(self, name: str, **known: Any) -> Item:
        """An item of this member, or, without a name, of the tar itself."""
        label = rules.folder_of(name) if self._labelled and name else ""
        return Item(
            id=self._told_apart(f"{self._name}#{name}" if name else self._name),
            uri=self._uri,
            label=label if label not in ("", ".") else None,
            **{"size": None, "mtime": None, **known},
        )

    def _told_apart(self, name: str) -> str:
        """The same name, or one that no other member has."""
        own = name
        while own in self._times:
            self._times[name] += 1
            own = f"{name};{self._times[name]}"
        self._times[own] = 1
        return rules.printable(own)

    def _carrying(self, item: Item, key: str) -> Item:
        carried = tuple(self._beside.get((key, extension)) for extension in self._keep)
        return item._replace(carried=carried)


def _passed_over(name: str) -> str | None:
    """As of a directory, where nothing in a hidden folder is listed."""
    *folders, last = name.split("/")
    if any(folder.startswith(".") and folder.strip(".") for folder in folders):
        return "hidden"
    return rules.passed_over(last)


def _key(name: str) -> tuple[str, str]:
    """The key and the extension of a member."""
    folder, slash, last = name.rpartition("/")
    first, _, extension = last.partition(".")
    return folder + slash + first, extension.lower()


def _text(file: File, member: TarInfo) -> str | None:
    if member.size > MOST_BYTES:
        return None
    try:
        file.seek(member.offset_data)
        data = file.read(member.size)
        return data.decode() if len(data) == member.size else None
    except (UnicodeDecodeError, *DAMAGED):
        return None


def _uri_of(root: str) -> str:
    if is_remote(root):
        place = StorePath.of(root)
        return f"{place.root}/{quote(place.key)}"
    return "file://" + quote_from_bytes(os.fsencode(root))
