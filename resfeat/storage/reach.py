"""Whether an address answers at all: a request or two that change nothing."""

import urllib.request
from contextlib import suppress
from urllib.error import HTTPError

from resfeat import __version__
from resfeat.errors import StoreError
from resfeat.storage.clouds import asking, connect
from resfeat.storage.location import locate
from resfeat.storage.remote import StorePath
from resfeat.storage.web import has_password, is_web


def reach(address: str, seconds: float) -> bool:
    """Whether there is anything at an address of a store or of the web. Raises UsageError for one
    that is none, and StoreError where nobody answers, or says no."""
    if is_web(address):
        return _reach_web(address, seconds)
    where = locate(address)
    assert isinstance(where, StorePath)
    limits = dict.fromkeys(("connect_timeout", "read_timeout", "timeout"), seconds)
    client = connect(where.root, limits, retries=0, patience=seconds)
    with suppress(FileNotFoundError), asking(where):
        if where.key and client.head(where.key):
            return True
    with asking(where):
        return any(client.list(where.key or None, chunk_size=1))


def _reach_web(address: str, seconds: float) -> bool:
    if has_password(address):
        raise StoreError("a password in an address is not sent: have the server ask for none")
    headers = {"User-Agent": f"resfeat/{__version__}"}
    request = urllib.request.Request(address, method="HEAD", headers=headers)
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except HTTPError as error:
        error.close()
        if error.code == 404:
            return False
        if error.code not in (405, 501):  # it answers, and only has no HEAD
            raise StoreError(f"HTTP Error {error.code}: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise StoreError(str(getattr(error, "reason", error))) from error
    return True
