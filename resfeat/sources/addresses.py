"""The addresses in a table as the URIs of items, a column at a time.

A path counts from the folder of its table. Of `file://` and `http://` the rest is percent-encoded
already, of a store it is the key itself, as its own tools write it.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
from collections.abc import Callable, Sequence
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from resfeat.sources.item import problem
from resfeat.sources.rules import printable
from resfeat.storage import SCHEMES, is_remote
from resfeat.storage.web import WEB, has_password

STORES = tuple(f"{scheme}://" for scheme in SCHEMES)
# What is a URI as it stands, behind that of the folder or not: no part of its path is empty, '.' or
# '..', but the first ones on a disk.
_STORES = "|".join(re.escape(each) for each in STORES)
_PART = r"(?:\.{0,2}[A-Za-z0-9_~-]|\.\.\.)[A-Za-z0-9_.~-]*"
_PLAIN = rf"^(?:/|file:///|(?:{_STORES})[A-Za-z0-9_.-]+/)?{_PART}(?:/{_PART})*$"
_PLAIN_ON_DISK = _PLAIN.replace("^(?:/", r"^(?:/|(?:\.\.?/)+")
_PLAIN_WEB = r"^https?://[A-Za-z0-9_.~-]+(?::[0-9]+)?/[A-Za-z0-9_.~/?&=%+,:;-]*$"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA = r"(?i)^data:(?:[\w.+-]+/[\w.+-]+)?(?:;[^,/]*)*,"  # a whole image follows
_PASSWORD = r"^((?i:https?|s?ftps?)://)[^/?#]*@"
_IN_WEB = "%/:?#[]@!$&'()*+,;=~"


class Addresses:
    """What the addresses of one table mean. folder: where that table lies, a path or an address."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._start = self._quoted(os.path.join(folder, ""))

    def uris(self, texts: pa.Array) -> tuple[pa.Array, pa.Array]:
        """The URI of each address, and the `Item.problem` of each that has one."""
        plain = _PLAIN if is_remote(self._folder) else _PLAIN_ON_DISK
        is_plain = pc.match_substring_regex(texts, plain)
        is_uri = functools.reduce(
            pc.or_, (pc.starts_with(texts, start) for start in ("file://", *STORES))
        )
        start = pc.if_else(pc.starts_with(texts, "/"), "file://", self._start)
        uris = pc.binary_join_element_wise(pc.if_else(is_uri, "", start), texts, "")
        if pc.all(is_plain, skip_nulls=False).as_py():
            return uris, pa.nulls(len(texts), pa.string())
        is_web = pc.match_substring_regex(texts, _PLAIN_WEB)
        return self._closely(texts, pc.if_else(is_web, texts, uris), pc.or_(is_plain, is_web))

    def _closely(
        self, texts: pa.Array, uris: pa.Array, is_plain: pa.Array
    ) -> tuple[pa.Array, pa.Array]:
        """The same where some are not plain: these are looked at one by one."""
        there = np.asarray(pc.fill_null(is_plain, False))
        places = np.flatnonzero(~there)
        pairs = [self.uri(text) for text in texts.take(pa.array(places)).to_pylist()]
        found = pa.array([uri for uri, _ in pairs], pa.string())
        problems = pa.array([what for _, what in pairs], pa.string())
        mask, none = pa.array(~there), pa.nulls(len(texts), pa.string())
        return pc.replace_with_mask(uris, mask, found), pc.replace_with_mask(none, mask, problems)

    def uri(self, text: str | None) -> tuple[str, str | None]:
        """The same of one address."""
        if not text or text.isspace():
            return self._start, problem("not_found", "the table has no address there")
        if re.match(_DATA, text):
            return _unknown("data:", "data:")
        found = _SCHEME.match(text)
        if not found:
            return self._path(text)
        scheme, rest = found[0].lower(), text[found.end() :]
        if scheme == "file://":
            host, _, path = rest.partition("/")
            if host not in ("", "localhost"):
                uri = scheme + quote(rest, safe=_IN_WEB)
                return uri, problem("not_found", "it is on another machine")
            return _checked("file:///" + quote_from_bytes(unquote_to_bytes(path)))
        return _object(scheme, rest) if scheme in STORES else _on_the_web(scheme, rest)

    def _path(self, text: str) -> tuple[str, str | None]:
        if text[0] == "/" or not is_remote(self._folder):
            return _checked(self._quoted(os.path.join(self._folder, text)))
        scheme, _, folder = self._folder.partition("://")
        return _object(f"{scheme}://", posixpath.normpath(os.path.join(folder, text)))

    def _quoted(self, path: str) -> str:
        if is_remote(path):
            scheme, _, rest = path.partition("://")
            return _object(f"{scheme}://", rest)[0]
        return "file://" + quote_from_bytes(os.fsencode(path))


def _object(scheme: str, path: str) -> tuple[str, str | None]:
    bucket, _, key = path.partition("/")
    uri = f"{scheme}{bucket}/{quote(key)}"
    if "/" not in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
        return uri, problem("not_found", "no object has such an address")
    return _checked(uri)


def _on_the_web(scheme: str, rest: str) -> tuple[str, str | None]:
    uri = scheme + quote(rest, safe=_IN_WEB)
    try:
        if has_password(uri):
            message = "a password in an address is not sent"
            return without_password(uri), problem("permission", message)
    except ValueError as error:  # of brackets that do not match
        return without_password(uri), problem("not_found", f"no address: {error}")
    return (uri, None) if scheme in WEB else _unknown(uri, scheme)


def _unknown(uri: str, scheme: str) -> tuple[str, str | None]:
    known = ", ".join(("file://", *STORES, *WEB))
    return uri, problem("io_error", f"{scheme} is not read: give a path, or one of {known}")


def _checked(uri: str) -> tuple[str, str | None]:
    return uri, problem("not_found", "no path has a NUL in it") if "%00" in uri else None


def without_password(address: str) -> str:
    """An address as it may be shown."""
    return re.sub(_PASSWORD, r"\1", address)


def shown(texts: pa.Array) -> pa.Array:
    """The same of many; null for those that are images themselves."""
    if pc.any(pc.starts_with(texts, "data:", ignore_case=True)).as_py():
        texts = pc.if_else(pc.match_substring_regex(texts, _DATA), None, texts)
    if pc.any(pc.match_substring(texts, "@")).as_py():
        return pc.replace_substring_regex(texts, _PASSWORD, r"\1")
    return texts


def folders(uris: pa.Array) -> pa.Array:
    """The name of the folder that each URI ends in."""
    path = r"^[a-z0-9]+://[^?#]*/(?P<folder>[^/?#]*)/[^/?#]*(?:[?#].*)?$"
    found = pc.extract_regex(uris, path)
    return _each(found.field("folder"), lambda name: printable(os.fsdecode(unquote_to_bytes(name))))


def _each(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """Each of the texts changed; of those that are alike, one is."""
    coded = texts.dictionary_encode()
    changed: Sequence[str] = [change(text) for text in coded.dictionary.to_pylist()]
    return pa.array(changed, pa.string()).take(coded.indices)
