"""The Hugging Face Hub: what a repository holds, and fetching some of it; every trouble in one sentence.

Only `huggingface_hub` talks to the network. Its environment variables count: HF_ENDPOINT (a mirror),
HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import glob
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from repae_lite.utils.downloads import fetching
from repae_lite.utils.locks import check_space, writing

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@((?!/|.*\.\.)[\w./-]+))?")  # as in git, no revision holds ".."


@dataclass(frozen=True)
class Repository:
    """What the Hub says about a repository at a revision.

    Attributes:
        name: "owner/name".
        commit: the full commit, which later calls stay with.
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
    """Refuses what is not OWNER/NAME with a ValueError."""
    with suppress(HFValidationError):
        validate_repo_id(name)
        if parse_hub_id(name) == (name, None):
            return
    raise ValueError(f"{name!r} is no repository of the Hub: give OWNER/NAME")


def look_up(name: str, revision: str | None = None) -> Repository:
    """Asks the Hub what a repository holds.

    Raises:
        ConnectionError: offline, or the Hub does not answer.
        ValueError: no such repository or revision, no access, or an HF_ENDPOINT that is no address.
    """
    api = _api()
    with fetching(name, revision, remedy="give a file"):
        info = api.model_info(name, revision=revision, files_metadata=True)
    # A backslash separates folders on some systems: such a file's place would depend on the machine.
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "\\" not in file.rfilename}
    return Repository(name, info.sha, sizes)


def fetch(name: str, revision: str | None, choose: Callable[[list[str]], list[str]]) -> Path:
    """Brings some files of a repository into the Hub's cache and returns the path of the first.

    Without a connection it is what the cache holds, with a warning unless HF_HUB_OFFLINE asks for it.

    Args:
        name: "owner/name".
        revision: branch, tag or commit.
        choose: gets the names of all files and returns those to fetch.

    Raises:
        ConnectionError: no connection, and what is chosen is not in the cache; or the download breaks off.
        ValueError: as `look_up`.
        Whatever `choose` raises; of the cache's files its FileNotFoundError becomes a ConnectionError.
    """
    where, missing = f"{name}@{revision}" if revision else name, None
    try:
        repository = look_up(name, revision)
    except ConnectionError as error:
        missing = error
    if missing is None:
        names = choose(list(repository.sizes))
        with fetching(name, revision):
            folder = snapshot_download(
                name,
                revision=revision,
                allow_patterns=[glob.escape(file) for file in names],
                endpoint=constants.ENDPOINT,
            )
        return Path(folder) / names[0]
    folder = None
    with fetching(name, revision), suppress(FileNotFoundError):
        # No pattern: the client need not hold the folder against the whole repository.
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    try:
        if folder is None:
            raise FileNotFoundError
        names = choose([file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()])
    except FileNotFoundError:
        raise ConnectionError(f"{where} is not in the cache, or not all of it; {missing}") from None
    if not constants.HF_HUB_OFFLINE:
        warnings.warn(f"the Hub does not answer, so {where} is taken from the cache", stacklevel=2)
    return folder / names[0]


def download(repository: Repository, names: list[str], folder: Path) -> None:
    """Brings files of a repository into a folder, each whole or not at all; unchanged, whole files stay.

    Raises:
        OSError: too little room, a folder that cannot be made, or a file that is not of the listed size even
            when fetched anew.
        ConnectionError, ValueError: as `fetch`.
    """
    there = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    needed = sum(repository.sizes[name] for name in names) - there
    place = {"revision": repository.commit, "local_dir": folder, "endpoint": constants.ENDPOINT}

    def fetch_one(name: str, **options: bool) -> None:
        with fetching(f"{name} of {repository.name}", repository.commit[:8], folder=folder):
            hf_hub_download(repository.name, name, **place, **options)

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, needed, f"{repository.name} needs")
        for name in names:
            path, size = folder / name, repository.sizes[name]
            fetch_one(name)
            if size and path.stat().st_size != size:  # the client goes by the time of the last change alone
                fetch_one(name, force_download=True)
            if size and path.stat().st_size != size:
                raise OSError(
                    f"{path} has {path.stat().st_size:,} bytes where {repository.name} lists {size:,}: "
                    "delete it and try again later"
                )


def upload(folder: Path, files: list[str], name: str, *, private: bool) -> str:
    """Puts some of a folder's files into a repository, which is made if need be; returns its address.

    Raises:
        ConnectionError, ValueError: as `look_up`; ValueError too when nobody is logged in, or for a name that
            is none.
    """
    check_repository(name)
    api = _api()
    with fetching(name):
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
            f"HF_ENDPOINT is {constants.ENDPOINT!r}: unset it, or set it to an address with http:// or https://"
        )
    return HfApi(endpoint=constants.ENDPOINT)
