"""Files on the web, by http and https: polite, patient, and never more than is asked for."""

from __future__ import annotations

import logging
import time
from email.utils import parsedate_to_datetime
from functools import lru_cache
from math import inf
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from urllib3.exceptions import HTTPError, MaxRetryError, ProtocolError, ReadTimeoutError

from resfeat import __version__
from resfeat.errors import Reason, first_line

WEB = ("http://", "https://")
CONNECT_SECONDS, READ_SECONDS = 10, 20  # the latter without a byte
ATTEMPTS, REDIRECTS = 4, 10
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
# A server may ask to be left alone for hours. No worker waits for that long.
MOST_SECONDS_BETWEEN = 30
# Connections to one host, of one process.
PER_HOST = 16
# More than there are readers, so that no host is dropped of which something is just read.
HOSTS = 256
PIECE = 1 << 20
PASSING = (429, 500, 502, 503, 504)
_REASONS: dict[int, Reason] = {
    401: "permission", 403: "permission", 404: "not_found", 410: "not_found",
}  # fmt: skip

# It would tell of each attempt, with the whole address.
logging.getLogger("urllib3").setLevel(logging.ERROR)


class WebError(OSError):
    """A file on the web that cannot be had."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class _Patience(urllib3.Retry):
    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        seconds = super().get_retry_after(response)
        return None if seconds is None else min(seconds, MOST_SECONDS_BETWEEN)


def is_web(address: str) -> bool:
    return address.startswith(WEB)


def has_password(address: str) -> bool:
    """Whether an address has a user's name or password in it, which are not sent."""
    return "@" in urlsplit(address).netloc


def get(address: str, most: float = inf, seconds: float = inf) -> tuple[bytes, int | None]:
    """The content of an address, at most so many bytes, and when it was last modified (microseconds
    since 1970, None where the server does not tell).

    Where there is trouble, or a server asks to wait, it is tried again a few times. seconds: how
    long the content may be on its way. Raises WebError.
    """
    again = Retrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        retry=retry_if_exception_type((ProtocolError, ReadTimeoutError)),
        reraise=True,
    )
    try:
        if has_password(address):
            raise WebError("permission", "a password in an address is not sent")
        return again(_once, address, most, seconds)
    except WebError:
        raise
    except (HTTPError, ValueError) as error:  # the latter of addresses that are none
        reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        # What urllib3 says begins with an object's address in memory, or the host's.
        raise WebError("io_error", first_line(reason).rpartition(">: ")[2]) from error


def _once(address: str, most: float, seconds: float) -> tuple[bytes, int | None]:
    answer = _pool(_proxy(address)).request(
        "GET", address, preload_content=False, retries=_patience()
    )
    try:
        if answer.status != 200:
            reason = _REASONS.get(answer.status, "io_error")
            raise WebError(reason, f"HTTP Error {answer.status}: {answer.reason}")
        content = _content(answer, most, seconds)
    except BaseException:
        answer.close()  # what is left of it is not waited for
        raise
    finally:
        answer.release_conn()
    return content, _modified(answer.headers.get("Last-Modified"))


def _content(answer: urllib3.BaseHTTPResponse, most: float, seconds: float) -> bytes:
    started, content = time.monotonic(), bytearray()
    while piece := answer.read(PIECE):
        content += piece
        if len(content) > most:
            raise WebError("too_large", f"more than {most:,} bytes")
        if time.monotonic() - started > seconds:
            raise WebError("io_error", f"only {len(content):,} bytes came in {seconds:g} s")
    return bytes(content)


def _modified(written: str | None) -> int | None:
    try:
        return round(parsedate_to_datetime(written).timestamp()) * 10**6 if written else None
    except ValueError:
        return None


def _patience() -> urllib3.Retry:
    return _Patience(
        total=None,
        connect=ATTEMPTS - 1,
        read=ATTEMPTS - 1,
        redirect=REDIRECTS,
        status=ATTEMPTS - 1,
        other=0,
        status_forcelist=PASSING,
        backoff_factor=FIRST_PAUSE,
        backoff_max=LONGEST_PAUSE,
        backoff_jitter=FIRST_PAUSE,
        raise_on_status=False,
    )


def _proxy(address: str) -> str | None:
    """The proxy that the usual variables name for an address."""
    parts = urlsplit(address)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


@lru_cache
def _pool(proxy: str | None) -> urllib3.PoolManager:
    options: dict[str, Any] = {
        "num_pools": HOSTS,
        "maxsize": PER_HOST,
        "block": True,
        "timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        "headers": {"User-Agent": f"resfeat/{__version__}", "Accept-Encoding": "identity"},
    }
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
