"""Images on the web, which only tables name."""

from resfeat.errors import Failure
from resfeat.sources.item import Item
from resfeat.sources.rules import MAX_BYTES
from resfeat.storage import web

# However slowly a server sends its bytes.
SECONDS = 300
_HTML = (b"<!doctype html", b"<html")


def read(item: Item) -> tuple[bytes, int, int | None] | Failure:
    """See `sources.read`."""
    try:
        data, mtime = web.get(item.uri, MAX_BYTES, SECONDS)
    except web.WebError as error:
        return Failure("read", error.reason, str(error))
    if not data:
        return Failure("read", "empty", "0 bytes")
    if data[:64].lstrip(b"\xef\xbb\xbf\t\n\r ").lower().startswith(_HTML):
        return Failure("read", "unidentified", "a page of HTML, and no image")
    return data, len(data), mtime
