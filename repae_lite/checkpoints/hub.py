"""The Hugging Face Hub: what a repository holds, and fetching some of it; every trouble in one sentence.

Only `huggingface_hub` talks to the network. Its environment variables count: HF_ENDPOINT (a mirror),
HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import glob
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@((?!/|.*\.\.)[\w./-]+))?")  # as in git, no revision holds ".."


@dataclass(frozen=True)
class Repository:
    """What the Hub says about a repository at a revision.

    Attributes:
        name: "owner/name". commit: the full commit, which later calls stay with.
        sizes: name -> bytes of its files (0 where the Hub does not say).
    """

    name: str
    commit: str
    sizes: dict[str, int]


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """("owner/name", revision or None) of "owner/name[@revision]"; None for anything else."""
    match = _HUB_ID.fullmatch(text)
    return (match[1], match[2]) if match else None


def check_repository(name: str) -> None:
    """Refuses what is not OWNER/NAME.

    Raises:
        ValueError: then.
    """
    try:
        validate_repo_id(name)
        fits = parse_hub_id(name) == (name, None)
    except HFValidationError:
        fits = False
    if not fits:
        raise ValueError(f"{name!r} is no repository of the Hub: give OWNER/NAME")


def look_up(name: str, revision: str | None = None) -> Repository:
    """Asks the Hub what a repository holds.

    Raises:
        ConnectionError: offline, or the Hub does not answer. ValueError: no such repository or revision, no
            access, or an HF_ENDPOINT that is no address.
    """
    with _one_sentence(name, revision):
        info = _api().model_info(name, revision=revision, files_metadata=True)
    # a backslash separates folders on some systems, so such a file's place would depend on the machine
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "\\" not in file.rfilename}
    return Repository(name, info.sha, sizes)


def fetch(name: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """Brings some files of a repository into the Hub's cache and returns the folder with them; without a
    connection, what the cache holds, with a warning unless HF_HUB_OFFLINE asks for it.

    Args:
        name: "owner/name". revision: branch, tag or commit.
        choose: gets the names of the files and returns those to fetch; a folder's name stands for the
            safetensors files in it.

    Raises:
        ConnectionError: no connection, and what is chosen is not in the cache; or the download breaks off.
            ValueError: as `look_up`.
        Whatever `choose` raises; of the cache's files its FileNotFoundError becomes a ConnectionError.
    """
    if constants.HF_HUB_OFFLINE:
        return _cached(name, revision, choose)
    try:
        repository = look_up(name, revision)
    except ConnectionError as error:
        try:
            folder = _cached(name, revision, choose)
        except ConnectionError:
            raise ConnectionError(
                f"{_where(name, revision)} is not wholly in the cache, and {error}"
            ) from None
        warnings.warn(
            f"the Hub does not answer, so {_where(name, revision)} is taken from the cache", stacklevel=2
        )
        return folder
    listed, commit = list(repository.sizes), repository.commit
    names = [
        file
        for chosen in choose(listed)
        for file in listed
        if file == chosen or fnmatchcase(file, f"{chosen}/*.safetensors")
    ]
    with _one_sentence(name, revision):
        paths = [
            Path(hf_hub_download(name, file, revision=commit, endpoint=constants.ENDPOINT)) for file in names
        ]
    folder = paths[0].parents[names[0].count("/")]
    if (revision or "main") != commit:
        # asked for a commit, the client does not note which branch it is of; without this note the cache does
        # not know the branch
        _note(folder.parents[1] / "refs" / (revision or "main"), commit)
    return folder


def _cached(name: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """The cache's folder of a repository, if what is chosen among its files is there.

    Raises:
        ConnectionError: it is not. Whatever else `choose` raises.
    """
    with _one_sentence(
        name, revision
    ):  # no pattern: the client need not hold the folder against the whole repository
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    try:
        choose([path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()])
    except FileNotFoundError:
        raise ConnectionError(
            f"the file of {_where(name, revision)} that is asked for is not in the cache and the Hub cannot "
            "be reached (offline): "
            "connect and unset HF_HUB_OFFLINE, or give a file"
        ) from None
    return folder


def _note(path: Path, text: str) -> None:
    """Writes a short file whole; a cache that cannot be written stays as it is, as the client leaves it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def download(repository: Repository, names: list[str], folder: Path) -> None:
    """Brings files of a repository into a folder, each whole or not at all; those that are there, unchanged
    and whole stay.

    Raises:
        OSError: too little room, a folder that cannot be made, or a file that is not of the listed size even
            when fetched anew.
        ConnectionError, ValueError: as `fetch`.
    """
    there = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    needed = sum(repository.sizes[name] for name in names) - there
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another --output-dir"
        ) from None
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{repository.name} needs {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are "
            "free: free space, or "
            "choose another --output-dir"
        )
    with _one_sentence(repository.name, repository.commit):
        for name in names:
            place = {"revision": repository.commit, "local_dir": folder, "endpoint": constants.ENDPOINT}
            path, size = folder / name, repository.sizes[name]
            hf_hub_download(repository.name, name, **place)
            if size and path.stat().st_size != size:  # the client goes by the time of the last change alone
                hf_hub_download(repository.name, name, force_download=True, **place)
            if size and path.stat().st_size != size:
                raise OSError(
                    f"{path} has {path.stat().st_size:,} bytes where {repository.name} lists {size:,}: "
                    "delete it and try again later"
                )


def upload(folder: Path, files: list[str], name: str, *, private: bool) -> str:
    """Puts some of a folder's files into a repository, which is made if need be; returns its address.

    Raises:
        ConnectionError, ValueError: as `look_up`; ValueError too when nobody is logged in.
    """
    with _one_sentence(name, None):
        api = _api()
        address = api.create_repo(name, private=private, exist_ok=True)
        patterns = [glob.escape(file) for file in files]
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=patterns, commit_message="Export from repae_lite"
        )
    return str(address)


def _api() -> HfApi:
    """The client.

    Raises:
        ValueError: HF_ENDPOINT is no address.
    """
    if not constants.ENDPOINT.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"HF_ENDPOINT is {constants.ENDPOINT!r}: set it to an address with http:// or https://, or unset "
            "it"
        )
    return HfApi(endpoint=constants.ENDPOINT)


def _where(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


@contextmanager
def _one_sentence(name: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into a sentence; its network errors are those of the HTTP package that its
    version uses.

    Raises:
        ConnectionError, ValueError: instead.
    """
    where = _where(name, revision)
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise ConnectionError(
            f"{where} is not in the cache and the Hub cannot be reached (offline): connect and unset "
            "HF_HUB_OFFLINE, or give a file"
        ) from None
    except GatedRepoError:
        raise ValueError(
            f"{where} wants its terms accepted: accept them on its page, then log in with hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no repository {name} on the Hub, or it is private: check the name, or log in"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(
            f"{name} has no revision {revision!r}: give one of its branches, tags or commits"
        ) from None
    except EntryNotFoundError as error:
        raise ValueError(
            f"{where} lacks a file that was expected ({_first_line(error)}): list its files"
        ) from None
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise ValueError(
                f"the Hub refuses access to {where} ({code}): log in with hf auth login"
            ) from None
        raise ConnectionError(
            f"the Hub answers {where} with an error ({_first_line(error)}): try again later"
        ) from None
    except Exception as error:
        packages = [type(one).__module__.split(".")[0] for one in (error, error.__cause__)]
        network = bool({"requests", "httpx", "httpx2", "urllib3"} & set(packages))
        network = network or isinstance(
            error.__cause__, HfHubHTTPError
        )  # as the client wraps them where it fetches a file anew
        if not network and "Consistency check failed" not in str(error):
            raise
        raise ConnectionError(
            f"the connection to the Hub broke off at {where} ({_first_line(error) or type(error).__name__}): "
            "give the same command "
            "again; finished files are kept"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".:")
