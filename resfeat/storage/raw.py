"""Listings asked for without obstore, which gives up at a key such as `a//b` or `./a`.

Only the pages around such keys are: obstore signs the address, everything else is plain.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime
from http.client import HTTPException
from typing import NamedTuple
from urllib.parse import unquote_plus, urlencode
from xml.etree import ElementTree

import pyarrow as pa

from resfeat.errors import StoreError, first_line
from resfeat.storage import clouds, remote
from resfeat.storage.fetch import mtime_of
from resfeat.storage.remote import StorePath

# What obstore takes for no path: an empty part, `.` and `..`, and control characters.
UNUSABLE = re.compile(r"(?:^|/)\.{0,2}(?:/|$)|[\x00-\x1f\x7f]")
_TIMES = 4

# What is listed of an object.
OBJECT = pa.schema([
    pa.field("key", pa.string(), nullable=False),
    pa.field("size", pa.int64()),  # bytes
    pa.field("mtime", pa.timestamp("us", tz="UTC")),  # whole seconds
    pa.field("etag", pa.string()),  # Azure's without its quotes
])  # fmt: skip


class Page(NamedTuple):
    """Some objects that follow one another in key order, a row of `OBJECT` each."""

    objects: pa.RecordBatch
    unusable: int = 0  # keys met here that no path has; they are not among these
    is_last: bool = False  # of a prefix, or of what was asked for

    @property
    def keys(self) -> pa.StringArray:
        return self.objects["key"]


def raw_pages(
    prefix: StorePath, after: str | None, until: str | None
) -> Iterator[tuple[Page, str | None]]:
    """Pages from behind a key on, each with its last key, up to one from which obstore can go on,
    or to the key `until`. Raises StoreError."""
    while True:
        query = {"list-type": "2", "encoding-type": "url"}
        query |= {"prefix": f"{prefix.key}/"} if prefix.key else {}
        query |= {"start-after": after} if after else {}
        page, after = _parsed(_asked(prefix, query), until)
        yield page, after
        if page.is_last or after is None or not UNUSABLE.search(after):
            return


def _asked(prefix: StorePath, query: dict[str, str]) -> bytes:
    """The answer to a listing, tried again a few times. Raises StoreError."""
    for pause in range(_TIMES):
        request = urllib.request.Request(*clouds.listing_request(prefix.root, urlencode(query)))
        try:
            with urllib.request.urlopen(request, timeout=remote.REQUEST_SECONDS) as answer:
                return bytes(answer.read())
        except (OSError, HTTPException) as error:
            why = error
            time.sleep(pause)
    raise StoreError(
        f"{prefix}: {first_line(why)}, while keys were listed that no path has: rename or remove "
        "these, or try again"
    ) from why


def _parsed(content: bytes, until: str | None) -> tuple[Page, str | None]:
    """The objects of an answer, without those that no path has, and its last key."""
    root = ElementTree.fromstring(content)
    decoded = unquote_plus if root.findtext("{*}EncodingType") == "url" else str
    found = [(decoded(each.findtext("{*}Key", "")), each) for each in root.iterfind("{*}Contents")]
    is_last = root.findtext("{*}IsTruncated") != "true"
    if until is not None:
        is_last |= any(key > until for key, _ in found)
        found = [(key, each) for key, each in found if key <= until]
    good = [
        (key, each) for key, each in found if not key.endswith("/") and not UNUSABLE.search(key)
    ]
    unusable = sum(bool(UNUSABLE.search(key.removesuffix("/"))) for key, _ in found)
    written = [datetime.fromisoformat(each.findtext("{*}LastModified", "")) for _, each in good]
    columns = {
        "key": [key for key, _ in good],
        "size": [int(each.findtext("{*}Size", "0")) for _, each in good],
        "mtime": [mtime_of(when.timestamp()) for when in written],
        "etag": [each.findtext("{*}ETag") for _, each in good],
    }
    page = Page(pa.record_batch(columns, schema=OBJECT), unusable, is_last)
    return page, found[-1][0] if found else None
