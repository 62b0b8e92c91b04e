"""A listing of sources of any kind, mixed as one likes."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Protocol

import pyarrow as pa

from resfeat.errors import UsageError
from resfeat.sources import places, rules, unique
from resfeat.sources.directory import Directories
from resfeat.sources.item import Item, items_of, schema_of
from resfeat.sources.prefix import Prefixes
from resfeat.sources.table import Tables
from resfeat.sources.tar import Tars
from resfeat.spec import SourceOptions
from resfeat.storage import is_remote, locate

_UNNEEDED = re.compile(r"(?<=[^/:])/+$")  # slashes at the end


class Part(Protocol):
    """The sources of one kind. carried: the columns of `Item.carried`. skipped: what the last
    listing passed over, counted by kind."""

    carried: tuple[pa.Field, ...]
    skipped: Counter[str]

    def tables(self) -> Iterator[pa.Table]:
        """Their items, in a fixed order, as `item.table_of` makes them, one every `BEAT_SECONDS`
        or so: an empty one if need be. Ids are unique, but for those of `Tables`."""


class Listing:
    """The items of some sources, in a fixed order. roots: the sources. carried, skipped: as of a
    `Part`. Nothing in a source is looked at before the items or what they carry are asked for."""

    def __init__(self, roots: Sequence[str], options: SourceOptions) -> None:
        self.roots, self._options = roots, options
        self._opened = list[Part]()

    def _parts(self) -> Sequence[Part]:
        """Raises UsageError where a source lies within another, or a table is not what it should
        be."""
        self._opened = self._opened or _parts(self.roots, self._options)
        return self._opened

    def open(self) -> None:
        """Raise UsageError where it cannot be listed what is asked for."""
        _ = self.carried

    @cached_property
    def carried(self) -> tuple[pa.Field, ...]:
        """Raises UsageError where no source has what is to be kept, and as above."""
        carried = _together(self._parts())
        if unknown := set(self._options.keep) - {field.name for field in carried}:
            raise UsageError(
                f"--keep {min(unknown)}: only tables and tars have what can be kept, and none is "
                "named: leave it out, or give a table that lists the images (see --uri-column)"
            )
        return carried

    @property
    def skipped(self) -> Counter[str]:
        return sum((part.skipped for part in self._opened), Counter[str]())

    def tables(self) -> Iterator[pa.Table]:
        """The items as tables, as those of a `Part`, and with each id once. Where some are in
        tables, which say what they like, all ids are looked at before."""
        parts = self._parts()
        if all(
            not isinstance(part, Tables) or (part.is_by_place and len(parts) == 1) for part in parts
        ):
            return self._listed()
        return unique.resolved(chain.from_iterable(map(_ids, parts)), self._listed())

    def _listed(self) -> Iterator[pa.Table]:
        for part in self._parts():
            for table in part.tables():
                yield table if part.carried == self.carried else _aligned(table, self.carried)

    def __iter__(self) -> Iterator[Item]:
        return chain.from_iterable(map(items_of, self.tables()))


def listing(sources: Sequence[str], options: SourceOptions | None = None) -> Listing:
    """A listing of directories, prefixes in a store, tars, tables, or single images.

    Raises UsageError where a source is missing, is a dataset, or lies within another, StoreError
    where the store is out of reach or does not let us look.
    """
    # Of an address of another kind `locate` raises UsageError.
    local = _sorted(
        os.path.abspath(str(locate(source))) for source in sources if not is_remote(source)
    )
    remote = _sorted(_UNNEEDED.sub("", source) for source in sources if is_remote(source))
    for root in [*local, *remote]:
        if places.container_of(root) != "table":  # which a resume does without
            places.check(root)
    return Listing([*local, *remote], options or SourceOptions())


def _parts(roots: Sequence[str], options: SourceOptions) -> list[Part]:
    """The sources by kind."""
    for root in roots:
        if places.container_of(root) == "table":
            places.check(root)
    every = [place for root in roots for place in places.expanded(root)]
    on_disk = _sorted(place for place in every if not is_remote(place))
    in_store = _sorted(place for place in every if is_remote(place))
    # Beside others they keep their whole addresses, so that no two images share an id.
    base = "" if on_disk else _base(in_store)
    parts = [*_of_kinds(on_disk, _base(on_disk), options), *_of_kinds(in_store, base, options)]
    # In one part, wherever they lie: any two of them may have an id in common.
    if tables := [root for root in (*on_disk, *in_store) if places.container_of(root) == "table"]:
        parts.append(Tables(tables, _base(on_disk) or base, options))
    return parts


def _of_kinds(roots: Sequence[str], base: str, options: SourceOptions) -> Iterator[Part]:
    """The sources by kind, all of them on a disk or all in a store. Raises UsageError where one
    lies within another. A folder passes its tars over, so they may be named beside it."""
    kinds = defaultdict[str | None, list[str]](list)
    for root in roots:
        kinds[places.container_of(root)].append(root)
    for some in kinds.values():
        rules.check_apart(some)
    if some := kinds[None]:
        folders = Prefixes if is_remote(some[0]) else Directories
        yield folders(some, base, options)
    if some := kinds["tar"]:
        yield Tars(some, base, options)


def _ids(part: Part) -> Iterator[pa.ChunkedArray | pa.Array]:
    return part.ids() if isinstance(part, Tables) else (table["id"] for table in part.tables())


def _sorted(roots: Iterable[str]) -> list[str]:
    """By components: whatever lies within a folder sorts right behind it."""
    return sorted(roots, key=lambda root: root.split("/"))


def _base(roots: Sequence[str]) -> str:
    """What the ids leave out of the paths or addresses: a single folder, or else the sources'
    common parent, so that no two images share an id."""
    if not roots:
        return ""
    if len(roots) == 1 and locate(roots[0]).is_dir():
        return os.path.join(roots[0], "")
    scheme = roots[0].partition("://")[0] + "://" if is_remote(roots[0]) else ""
    if not all(root.startswith(scheme) for root in roots):
        return ""  # of several stores
    above = os.path.commonpath([os.path.dirname(root.removeprefix(scheme)) for root in roots])
    return scheme + os.path.join(above, "")


def _together(parts: Sequence[Part]) -> tuple[pa.Field, ...]:
    """The columns that any of the parts carries. Raises UsageError where two differ in type."""
    found: dict[str, pa.Field] = {}
    for field in chain.from_iterable(part.carried for part in parts):
        if (other := found.setdefault(field.name, field)).type != field.type:
            raise UsageError(
                f"--keep {field.name}: it is {other.type} in one source and {field.type} in "
                "another: make two datasets, or give the column one type"
            )
    return tuple(found.values())


def _aligned(table: pa.Table, carried: Sequence[pa.Field]) -> pa.Table:
    """The same items, with nulls in the columns that only other sources have."""
    schema = schema_of(carried).with_metadata(table.schema.metadata)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
