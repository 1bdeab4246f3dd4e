"""The Hugging Face Hub: what a repository holds, and fetching some of it; every trouble in one sentence.

Only `huggingface_hub` talks to the network. Its environment variables count: HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


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


def look_up(name: str, revision: str | None = None) -> Repository:
    """Asks the Hub what a repository holds.

    Raises:
        ConnectionError: offline, or the Hub does not answer. ValueError: no such repository or revision, or no access.
    """
    with _one_sentence(name, revision):
        info = HfApi(endpoint=constants.ENDPOINT).model_info(name, revision=revision, files_metadata=True)
    return Repository(name, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})


def fetch(name: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """Brings some files of a repository into the Hub's cache and returns the folder with them; offline, what the cache holds.

    Args:
        name: "owner/name". revision: branch, tag or commit.
        choose: gets the names of the files and returns those to fetch.

    Raises:
        ConnectionError, ValueError: as `look_up`; ConnectionError also if the download breaks off.
    """
    if constants.HF_HUB_OFFLINE:
        with _one_sentence(name, revision):
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
    names = choose(list(look_up(name, revision).sizes))
    with _one_sentence(name, revision):
        paths = [Path(hf_hub_download(name, file, revision=revision, endpoint=constants.ENDPOINT)) for file in names]
    return paths[0].parents[names[0].count("/")]


def download(repository: Repository, names: list[str], folder: Path) -> None:
    """Brings files of a repository into a folder, each whole or not at all; those that are there and unchanged stay.

    Raises:
        OSError: too little room. ConnectionError, ValueError: as `fetch`.
    """
    there = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    needed = sum(repository.sizes[name] for name in names) - there
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{repository.name} needs {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free: free space, or "
            "choose another --output-dir"
        )
    with _one_sentence(repository.name, repository.commit):
        for name in names:
            hf_hub_download(repository.name, name, revision=repository.commit, local_dir=folder, endpoint=constants.ENDPOINT)


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Puts a folder's files into a repository, which is made if need be; returns its address.

    Raises:
        ConnectionError, ValueError: as `look_up`; ValueError too when nobody is logged in.
    """
    api = HfApi(endpoint=constants.ENDPOINT)
    with _one_sentence(name, None):
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export from repae_lite")
    return str(address)


@contextmanager
def _one_sentence(name: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into a sentence; its network errors are those of the HTTP package that its version uses.

    Raises:
        ConnectionError, ValueError: instead.
    """
    where = f"{name}@{revision}" if revision else name
    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise ConnectionError(
            f"{where} is not in the cache and the Hub cannot be reached (offline): connect and unset HF_HUB_OFFLINE, or give a file"
        ) from None
    except GatedRepoError:
        raise ValueError(f"{where} wants its terms accepted: accept them on its page, then log in with hf auth login") from None
    except RepositoryNotFoundError:
        raise ValueError(f"there is no repository {name} on the Hub, or it is private: check the name, or log in") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no revision {revision!r}: give one of its branches, tags or commits") from None
    except EntryNotFoundError as error:
        raise ValueError(f"{where} lacks a file that was expected ({_first_line(error)}): list its files") from None
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403):
            raise ValueError(f"the Hub refuses access to {where} ({code}): log in with hf auth login") from None
        raise ConnectionError(f"the Hub answers {where} with an error ({_first_line(error)}): try again later") from None
    except Exception as error:
        network = type(error).__module__.split(".")[0] in ("requests", "httpx", "httpx2", "urllib3")
        if not network and "Consistency check failed" not in str(error):
            raise
        raise ConnectionError(
            f"the connection to the Hub broke off at {where} ({_first_line(error) or type(error).__name__}): give the same command "
            "again; finished files are kept"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".:")
