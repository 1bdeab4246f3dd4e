"""Why a download failed, in one sentence: of the Hub, of timm's encoders and of the VGG-16 of LPIPS alike.

A cause is named where it is known, by an error's type, number or HTTP status, anywhere in its chain of
causes; of anything else the library's own words are passed on.
"""

import errno
import http.client
import re
import socket
import ssl
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from repae_lite.utils.errors import first_line

AGAIN = "give the same command again; finished files are kept"
_LOG_IN = "log in with hf auth login"
_KINDS = (  # errors of the Hub's client: becomes, what it says, what to do; the first kind that fits
    (
        GatedRepoError,
        ValueError,
        "{where} wants its terms accepted",
        f"accept them on its page, then {_LOG_IN}",
    ),
    (DisabledRepoError, ValueError, "the Hub has disabled {where}", "see its page"),
    (
        RepositoryNotFoundError,
        ValueError,
        "there is no repository {name} on the Hub, or it is private",
        "check the name, or log in",
    ),
    (
        RevisionNotFoundError,
        ValueError,
        "{name} has no revision {revision!r}",
        "give one of its branches, tags or commits",
    ),
    (LocalTokenNotFoundError, ValueError, "nobody is logged in to the Hub", _LOG_IN),
    (
        EntryNotFoundError,
        ValueError,
        "{where} lacks a file that was expected ({words})",
        "list its files",
    ),
)
_NETWORK = {"requests", "httpx", "httpx2", "httpcore", "httpcore2", "urllib3"}  # packages of HTTP
_NETWORK_NUMBERS = {
    getattr(errno, name)
    for name in "ECONNREFUSED ECONNRESET ECONNABORTED EPIPE ETIMEDOUT ENETUNREACH ENETDOWN ENETRESET "
    "EHOSTUNREACH EHOSTDOWN EADDRNOTAVAIL ENOTCONN ESHUTDOWN".split()
}


class Trouble(NamedTuple):
    """Why a download failed: the kind of error to raise, the reason and what to do."""

    becomes: type[OSError] | type[ValueError]
    reason: str
    remedy: str


def trouble(
    error: BaseException, name: str, revision: str | None = None, *, hub: bool = True
) -> Trouble | None:
    """Why a download failed; None for an error that has nothing to do with one.

    Args:
        error: as the client raised it.
        name: of the repository, or of whatever was fetched.
        revision: of the repository.
        hub: it comes from the Hub and lies in HF_HOME; else from elsewhere, and lies in TORCH_HOME.
    """
    where, chain, words = f"{name}@{revision}" if revision else name, list(_chain(error)), first_line(error)
    server, home = ("the Hub", "HF_HOME") if hub else ("the server", "TORCH_HOME")

    def having(fits: Callable[[BaseException], object]) -> BaseException | None:
        return next((one for one in chain if fits(one)), None)

    local = isinstance(error, LocalEntryNotFoundError)
    if having(lambda one: isinstance(one, OfflineModeIsEnabled)) or (local and len(chain) == 1):
        unset = "connect and unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "connect"
        return Trouble(ConnectionError, f"{server} cannot be reached (offline)", unset)
    for kind, becomes, reason, remedy in _KINDS:
        if isinstance(error, kind) and not local:
            said = reason.format(name=name, revision=revision, where=where, words=words)
            return Trouble(becomes, said, remedy)
    if found := having(lambda one: isinstance(one, ssl.SSLCertVerificationError)):
        return Trouble(
            ConnectionError,
            f"{server}'s certificate is refused at {where} ({first_line(found)})",
            "check this machine's clock, or name your network's certificates in SSL_CERT_FILE",
        )
    if found := having(lambda one: type(one).__name__ in ("ProxyError", "InvalidProxyURL")):
        return Trouble(
            ConnectionError,
            f"the proxy fails at {where} ({first_line(found)})",
            "check HTTPS_PROXY and HTTP_PROXY",
        )
    if found := having(_status):
        return _answered(found, where, server)
    if found := having(_is_of_disk):
        place = found.filename or f"the cache in {home}"
        room = found.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"make room there, or set {home} to another folder"
        if not room:
            remedy = f"mend that, or set {home} to a folder that can be written"
        return Trouble(OSError, f"{place} cannot be used ({found.strerror})", remedy)
    found = having(_is_of_network)
    if found or "Consistency check failed" in words:
        words = first_line(found or error)
        return Trouble(ConnectionError, f"the connection to {server} broke off at {where} ({words})", AGAIN)
    if _package(error) in ("hf_xet", "pyo3_runtime"):
        return failed(error, where)
    if _package(error) in ("huggingface_hub", "filelock"):
        return Trouble(ConnectionError, f"{server}'s client fails at {where} ({words})", AGAIN)
    return None


def failed(error: BaseException, where: str) -> Trouble:
    """The reason for an error of unknown cause that a transfer ended with: the library's own words."""
    return Trouble(
        ConnectionError,
        f"the transfer of {where} failed ({type(error).__name__}: {first_line(error)})",
        f"{AGAIN}; if it fails in the same way, set HF_HUB_DISABLE_XET=1 for another way of transfer",
    )


@contextmanager
def fetching(
    name: str,
    revision: str | None = None,
    *,
    hub: bool = True,
    remedy: str = "",
    folder: Path | None = None,
) -> Iterator[None]:
    """Turns whatever a call of a download's client fails with into a sentence.

    Nothing but the client may be called inside: any RuntimeError, ValueError or OSError is taken for its.

    Args:
        name: see `trouble`.
        revision: see `trouble`.
        hub: see `trouble`.
        remedy: another way out, as in "give a file".
        folder: what it is written to, whose own errors of the disk are left to the caller.

    Raises:
        ConnectionError, OSError, ValueError: instead.
    """
    try:
        yield
    except BaseException as error:
        disk = next(filter(_is_of_disk, _chain(error)), None)
        if disk and folder and Path(disk.filename or folder).is_relative_to(folder):
            raise disk from None
        found = trouble(error, name, revision, hub=hub)
        if found is None and isinstance(error, RuntimeError | ValueError | OSError | ImportError):
            found = failed(error, f"{name}@{revision}" if revision else name)
        if found is None:
            raise
        other = f", or {remedy}" if remedy else ""
        raise found.becomes(f"{found.reason}: {found.remedy}{other}") from None


def torch_hub_file(url: str, what: str, remedy: str) -> Path:
    """A file of torch's cache (TORCH_HOME), downloaded if it is not there.

    Args:
        url: it ends with the file's name, whose last part begins its SHA-256, as in vgg16-397923af.pth.
        what: to call it in errors.
        remedy: another way out.

    Raises:
        ConnectionError, OSError: see `fetching`.
        ValueError: what came is not the file of that name.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    with fetching(f"{what} ({url})", hub=False, remedy=remedy):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), _begins(path), progress=False)
    return path


def _begins(path: Path) -> str | None:
    """How the SHA-256 of a file of torch's cache begins, if its name says it."""
    found = re.search(r"-([a-f0-9]{8,})\.", path.name)
    return found and found[1]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what caused it."""
    seen: set[int] = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = getattr(error, "reason", None)  # of urllib and urllib3
        context = None if error.__suppress_context__ else error.__context__
        error = inner if isinstance(inner, BaseException) else error.__cause__ or context


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _status(error: BaseException) -> int | None:
    """The status of an HTTP answer that an error is about."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_disk(error: BaseException) -> bool:
    if not isinstance(error, OSError) or isinstance(
        error, socket.gaierror | ssl.SSLError | urllib.error.URLError
    ):
        return False
    return bool(error.errno) and error.errno not in _NETWORK_NUMBERS and _package(error) not in _NETWORK


def _is_of_network(error: BaseException) -> bool:
    kinds = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, urllib.error.URLError)
    if isinstance(error, kinds + (http.client.HTTPException,)) and _package(error) != "filelock":
        return True
    return _package(error) in _NETWORK or getattr(error, "errno", None) in _NETWORK_NUMBERS


def _answered(error: BaseException, where: str, server: str) -> Trouble:
    """The sentence for an HTTP status that is an error's."""
    status = _status(error)
    headers = getattr(getattr(error, "response", error), "headers", None) or {}
    if status in (401, 403):
        remedy = f"{_LOG_IN}, and check HF_TOKEN" if server == "the Hub" else "try another network"
        return Trouble(ValueError, f"{server} refuses access to {where} ({status})", remedy)
    if status == 407:
        return Trouble(ConnectionError, f"the proxy refuses {where} ({status})", "log in to the proxy")
    if status == 416:
        return Trouble(
            ConnectionError,
            f"{server} cannot go on with what is there of {where} ({status})",
            "remove its *.incomplete files, then give the same command again",
        )
    if status == 429:
        wait = headers.get("Retry-After")
        until = f"wait {wait} seconds" if str(wait).isdigit() else "wait a while"
        remedy = f"{until}, then {AGAIN}" + (
            "; who is logged in may ask more often" if server == "the Hub" else ""
        )
        return Trouble(ConnectionError, f"{server} was asked for {where} too often ({status})", remedy)
    said = f"{server} answers {where} with an error ({first_line(error)})"
    return Trouble(ConnectionError, said, "try again later")
