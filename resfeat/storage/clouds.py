"""The three clouds: whose an address is, how to get there, and what goes wrong on the way."""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from resfeat.errors import ResfeatError, StoreError, UsageError, first_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

# By scheme, where credentials and all else come from.
VARIABLES = {"s3": "AWS_*", "gs": "GOOGLE_*", "az": "AZURE_*", "abfs": "AZURE_*",
             "abfss": "AZURE_*"}  # fmt: skip
SCHEMES = tuple(VARIABLES)
KNOWN = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
FIRST_PAUSE, LONGEST_PAUSE = timedelta(milliseconds=100), timedelta(seconds=1)
LOOK_SECONDS = 5
SIGNED = timedelta(seconds=60)
CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"

_ADDRESS = re.compile(rf"(?:{'|'.join(VARIABLES)})://")
_STATUS = re.compile(r"status code: (\d{3}(?: [A-Z][A-Za-z]*)+)")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_CAUSE = re.compile(r'message: "([^"]+)"|\b(TimedOut)\b')
# What obstore says of a request that it sent more than once. It stops at either limit, and before,
# at what it does not send again.
_TRIED = re.compile(
    r"in (?:([\d.]+)s|\S+), after (\d+) retries, max_retries: (\d+), retry_timeout: (\d+)s"
)
# A missing bucket, in the words of each cloud. In a listing, 404 can mean nothing else.
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|list request.*404 Not Found", re.DOTALL)
_REFUSED = re.compile(r"status code: 40[13] ")
_WRONG_CREDENTIALS = re.compile(
    r"InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|AuthenticationFailed"
)
# Where a machine in a cloud is given credentials: asked once all else has given none.
_NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|token request")


class RefusedError(StoreError):
    """The store does not let us, which no other attempt can change."""


class MissingBucketError(StoreError):
    """There is no bucket of this name."""


class CredentialsError(RefusedError):
    """The store does not know who we are: there are no credentials, or they are wrong."""


class BrokenError(StoreError):
    """An answer that broke off or did not come, to what obstore does not ask again by itself."""


class BadKeyError(StoreError):
    """A key that no path has, such as `a//b`."""


class ChangedError(ResfeatError):
    """Another object has taken the place of the one that was asked for."""


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether this is an address in a store."""
    return bool(_ADDRESS.match(str(name)))


def split(address: str) -> tuple[str, str]:
    """Scheme and bucket of an address in a store, as `s3://bucket`, and the key, as it is."""
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def connect(root: str, limits: Mapping[str, float], retries: int, patience: float) -> ObjectStore:
    """A client of a bucket. limits: seconds, by obstore's names. patience: seconds after which a
    request is not sent again. Raises UsageError where it cannot be told what to connect to."""
    scheme, _, bucket = root.partition("://")
    kinds: dict[str, Any] = {"s3": (S3Store, _amazon), "gs": (GCSStore, _google)}
    kind, of = kinds.get(scheme, (AzureStore, _azure))
    found = of(bucket)
    provider = found.pop("credential_provider", None)
    options: Any = {name: timedelta(seconds=seconds) for name, seconds in limits.items()}
    # Only where somebody asks for it, by the address of an endpoint.
    endpoint = str(found.get("endpoint") or found.get("base_url"))
    options["allow_http"] = found.pop("allow_http", False) or endpoint.startswith("http://")
    client: ObjectStore = kind(
        config=found,
        client_options=options,
        credential_provider=provider,
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=patience),
            "backoff": {"init_backoff": FIRST_PAUSE, "max_backoff": LONGEST_PAUSE, "base": 2},
        },
    )
    return client


def listing_request(root: str, query: str) -> tuple[str, None, dict[str, str]]:
    """Address, data and headers of a listing of S3's or Google's, for urllib.

    obstore signs no listings. But it takes an endpoint as it is, and signs all that it has behind
    a question mark; its own key then becomes the value of a parameter that stores pass over.
    """
    scheme, _, bucket = root.partition("://")
    amazon = scheme == "s3"
    found: Any = (_amazon if amazon else _google)(bucket)
    provider = found.pop("credential_provider", None)
    if amazon:
        region = found.setdefault("region", "us-east-1")
        base = found.get("endpoint") or f"https://s3.{region}.amazonaws.com"
        if not _is_on("AWS_VIRTUAL_HOSTED_STYLE_REQUEST"):
            base = f"{base.rstrip('/')}/{bucket}"
    else:
        base = f"{(found.get('base_url') or 'https://storage.googleapis.com').rstrip('/')}/{bucket}"
    if _is_on("AWS_SKIP_SIGNATURE" if amazon else "GOOGLE_SKIP_SIGNATURE"):
        return f"{base}?{query}", None, {}
    if token := found.get("bearer_token") or (not amazon and _first("GOOGLE_BEARER_TOKEN")):
        return f"{base}?{query}", None, {"Authorization": f"Bearer {token}"}
    found["endpoint" if amazon else "base_url"] = f"{base}?{query}&x-id="
    client: Any = (
        S3Store(config=found | {"virtual_hosted_style_request": True}, credential_provider=provider)
        if amazon
        else GCSStore(config=found)
    )
    with asking(root):
        return obstore.sign(client, "GET", "list", SIGNED), None, {}


def _is_on(name: str) -> bool:
    return (_first(name) or "").lower() in ("1", "true", "yes", "on")


def _first(*names: str) -> str | None:
    """What the first of these variables that is set says."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _amazon(bucket: str) -> dict[str, Any]:
    found: dict[str, Any] = {"bucket": bucket, "disable_bulk_delete": True}
    if endpoint := _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        found["endpoint"] = endpoint
    is_given = _first(
        "AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE", "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )  # fmt: skip
    if not is_given and (provider := _profile()):
        found["credential_provider"] = provider
        found |= provider.config
    region = _first("AWS_REGION", "AWS_DEFAULT_REGION") or found.get("region")
    if region := region or (None if endpoint else _region_of(bucket)):
        found["region"] = region
    return found


def _profile() -> Any:
    """What gives the credentials of ~/.aws, which obstore does not read; None without boto3."""
    files = (Path.home() / ".aws" / name for name in ("credentials", "config"))
    if not (os.environ.get("AWS_PROFILE") or any(file.exists() for file in files)):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except (ImportError, ValueError):  # no boto3, or nothing in those files
        return None


def _region_of(bucket: str) -> str | None:
    """Where a bucket of Amazon's is, which it tells anybody; None if nobody says."""
    try:
        request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
        with urllib.request.urlopen(request, timeout=LOOK_SECONDS) as answer:
            headers = answer.headers
    except HTTPError as error:  # "forbidden" and "moved" tell it, too
        headers = error.headers
    except (OSError, ValueError):
        return None
    told: str | None = headers.get("x-amz-bucket-region")
    return told


def _google(bucket: str) -> dict[str, Any]:
    found: dict[str, Any] = {"bucket": bucket}
    if not _first("GOOGLE_BASE_URL") and (emulator := _first("STORAGE_EMULATOR_HOST")):
        found["base_url"] = emulator if "://" in emulator else f"http://{emulator}"
        found["bearer_token"] = "emulator"  # writes ask for one, even where they are not signed
    elif endpoint := _first("GOOGLE_BASE_URL"):
        found["base_url"] = endpoint
    return found


def _azure(place: str) -> dict[str, Any]:
    """place: a container, or CONTAINER@ACCOUNT.dfs.core.windows.net."""
    container, _, host = place.partition("@")
    found: dict[str, Any] = {"container_name": container}
    pairs = (each.partition("=") for each in (_first(CONNECTION) or "").split(";"))
    told = {name: value for name, _, value in pairs if value}
    names = {"AccountName": "account_name", "AccountKey": "account_key",
             "BlobEndpoint": "endpoint", "SharedAccessSignature": "sas_key"}  # fmt: skip
    found |= {names[name]: value for name, value in told.items() if name in names}
    if key := _first("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY"):
        found["account_key"] = key
    if endpoint := _first("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"):
        found["endpoint"] = endpoint
    if account := _first("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        found["account_name"] = account
    if host:
        found["account_name"] = host.partition(".")[0]
    if _is_on("AZURE_STORAGE_USE_EMULATOR"):
        found["allow_http"] = True
    elif "account_name" not in found:
        raise UsageError(
            f"az://{place}: in which account? Set AZURE_STORAGE_ACCOUNT_NAME, or {CONNECTION}"
        )
    return found


@contextmanager
def asking(what: object) -> Iterator[None]:
    """Give errors of obstore's their meaning. Raises FileNotFoundError where the object asked for
    is not there, ChangedError where it is another, and StoreError for all else."""
    try:
        yield
    except (FileNotFoundError, BaseError, ValueError) as error:
        text = str(error)
        if isinstance(error, FileNotFoundError) and not _NO_BUCKET.search(text):
            raise FileNotFoundError(f"{what} does not exist") from error
        if isinstance(error, PreconditionError):
            raise ChangedError(f"{what} was replaced meanwhile") from error
        raise _meaning(str(what), error, text) from error


def _meaning(what: str, error: Exception, text: str) -> StoreError:
    if isinstance(error, InvalidPathError):
        return BadKeyError(f"{what}: {first_line(error)}: rename that object, or remove it")
    variables = VARIABLES.get(what.partition("://")[0], "cloud's")
    if _NO_BUCKET.search(text):
        root, _ = split(what)
        return MissingBucketError(f"{what}: there is no bucket {root}: check the name, or make it")
    if _NO_CREDENTIALS.search(text):
        return CredentialsError(
            f"{what}: no credentials were found: set the {variables} variables of your cloud"
        )
    kind = StoreError if _STATUS.search(text) or _has_given_up(text) else BrokenError
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or _REFUSED.search(text):
        kind = CredentialsError if _WRONG_CREDENTIALS.search(text) else RefusedError
    return kind(
        f"{what}: {_told(error, text)}; check the address, the {variables} variables and the "
        "network, and give the same command again"
    )


def _has_given_up(text: str) -> bool:
    """Whether obstore sent a request as often, or for as long, as it may. That it sent it again is
    not enough: after a refusal, an answer may break off, which ends its attempts at once."""
    if not (tried := _TRIED.search(text)):
        return False
    seconds, times, most, patience = (float(each or 0) for each in tried.groups())
    return times >= most or seconds >= patience


def _told(error: Exception, text: str) -> str:
    """What an error says, in a few words. Without addresses: one may have a signature in it."""
    if status := _STATUS.search(text):
        code = _CODE.search(text)
        return f"{status[1]} ({code[1]})" if code else status[1]
    if isinstance(error, AlreadyExistsError):
        return "another wrote it at the same moment"
    causes = [cause or "it did not answer in time" for cause, _ in _CAUSE.findall(text)]
    plain = re.sub(r"\w+://\S+", "", first_line(error))
    return causes[-1] if causes else plain
