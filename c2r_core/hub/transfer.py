"""To and from the Hugging Face hub: nothing is overwritten unasked, and no pickle is fetched.

All that leaves or comes goes through one object, `huggingface_hub.HfApi`, which the caller may give: with
another endpoint it is another hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from c2r_core.artefacts.checksums import of_file
from c2r_core.artefacts.files import whole_folder
from c2r_core.formats import FORMATS, open_sae
from c2r_core.hub.card import model_card
from c2r_core.saes.files import CONFIG, WEIGHTS

CARD, REPORT = "README.md", "report.json"
LOG_IN = "Log in with `hf auth login`, and check the name and your rights."
SAFE = tuple(form for form in FORMATS.values() if form.WEIGHTS.endswith(".safetensors"))
"""Formats whose files hold nothing but tensors and JSON."""


class Pushed(NamedTuple):
    """What a push did."""

    url: str
    """Of the repository."""
    commit: str
    files: tuple[str, ...]
    """Files that are new or changed; empty if all was there already."""
    private: bool


def push(
    folder: str | Path,
    repo: str,
    *,
    report: str | Path | None = None,
    license: str | None = None,
    public: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> Pushed:
    """Put a saved SAE in a repository of its own, with a model card made from what is recorded.

    All files arrive in one commit. What was there stays in the repository's history.

    Parameters
    ----------
    folder : path
        As `save_sae` wrote it; both files are checked first.
    repo : str
        "owner/name". It is made if it is not there.
    report : path, optional
        A report of `c2r evaluate` on this SAE, to go along. None takes FOLDER/report.json, if there is one.
    license : str, optional
        The hub's short name of one, such as "mit".
    public : bool
        A new repository is for everyone to see. One that is there already stays as it is.
    overwrite : bool
        Replace files of the repository that have other contents.
    api : HfApi, optional
        A client of another hub, or with another login.

    Raises
    ------
    FileNotFoundError or ValueError
        As `model_card` does; ValueError too if `repo` is no name.
    FileExistsError
        If a file would be replaced and overwrite is False; the message lists them. Nothing is sent then.
    OSError
        If the hub cannot be reached, or refuses.
    """
    folder, api = Path(folder), api or HfApi()
    if report is None and (folder / REPORT).is_file():
        report = folder / REPORT
    card = model_card(folder, repo, report=report, license=license)
    files = {CONFIG: folder / CONFIG, WEIGHTS: folder / WEIGHTS, CARD: card.encode()}
    if report is not None:
        files[REPORT] = Path(report)
    with _explained(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=not public)
            info = api.model_info(repo)
        there = _files(api, repo, info.sha)
        changed = [
            name for name, content in files.items() if not _is_same(content, there.get(name))
        ]
        # A report that stays behind would be one on another SAE.
        stale = [name for name in (REPORT,) if changed and name in there and name not in files]
        replaced = [name for name in changed if name in there] + stale
        if replaced and not overwrite:
            raise FileExistsError(
                f"{repo} holds {', '.join(replaced)} with other contents; take another name, or "
                "overwrite=True (--overwrite)."
            )
        commit = info.sha
        if changed:
            operations = [CommitOperationAdd(name, files[name]) for name in changed]
            operations += [CommitOperationDelete(name) for name in stale]
            # Refused if another commit came between: what it brought has not been looked at.
            commit = api.create_commit(
                repo, operations, commit_message=f"SAE {folder.name}", parent_commit=info.sha
            ).oid
    return Pushed(f"{api.endpoint}/{repo}", commit, tuple(changed), bool(info.private))


def pull(
    repo: str, folder: str | Path, *, overwrite: bool = False, api: HfApi | None = None
) -> str:
    """Fetch an SAE to a folder that `open_sae` reads; returns the commit that it is from.

    Fetched are the files of weights (safetensors) and settings (JSON), and report.json if there is one. They
    are checked before the folder appears, whole or not at all.

    Parameters
    ----------
    repo : str
        "owner/name", "owner/name/folder/in/it", either with "@revision": a branch, a tag or a commit.
    folder : path
        New or empty.
    overwrite : bool
        Replace a folder that is there already.
    api : HfApi, optional
        A client of another hub, or with another login.

    Raises
    ------
    FileExistsError
        If the folder holds anything and overwrite is False.
    FileNotFoundError
        If there is no SAE in safetensors at this place.
    ValueError
        If `repo` is no name, or the SAE is damaged or cannot be represented exactly.
    OSError
        If the hub cannot be reached, or refuses.
    """
    folder, api = Path(folder), api or HfApi()
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty; take another folder, or overwrite=True (--overwrite)."
        )
    place, _, revision = repo.partition("@")
    name, inside = _split(place)
    with _explained(repo), whole_folder(folder, replace=overwrite) as part:
        commit = api.model_info(name, revision=revision or None).sha
        there = _files(api, name, commit, inside)
        for file in _safe_files(there, repo):
            fetched = api.hf_hub_download(
                name, str(PurePosixPath(inside, file)), revision=commit, local_dir=part / ".fetched"
            )
            Path(fetched).rename(part / file)
        shutil.rmtree(part / ".fetched")
        try:
            open_sae(part)
        except ValueError as error:
            raise ValueError(f"The SAE of {repo} cannot be opened: {error}") from error
    return commit


def _split(place: str) -> tuple[str, str]:
    """The repository's name, and the folder in it."""
    parts = place.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _safe_files(there: Mapping[str, RepoFile], repo: str) -> list[str]:
    """The files to fetch: those of one format, and the report."""
    fitting = [form for form in SAFE if {form.CONFIG, form.WEIGHTS} <= there.keys()]
    if len(fitting) != 1:
        wanted = " or ".join(f"{form.CONFIG} with {form.WEIGHTS}" for form in SAFE)
        found = ", ".join(sorted(there)) or "no files"
        raise FileNotFoundError(
            f"{repo} holds {found}; expected {wanted}, one SAE in a folder. Pickles (.pt, .bin) are not "
            "fetched. An SAE that is in a folder of the repository is owner/name/folder."
        )
    (form,) = fitting
    return [form.CONFIG, form.WEIGHTS, *([REPORT] if REPORT in there else [])]


def _files(api: HfApi, repo: str, commit: str, inside: str = "") -> dict[str, RepoFile]:
    """Files of one folder of a repository, by name."""
    entries = api.list_repo_tree(repo, inside or None, revision=commit)
    return {PurePosixPath(e.path).name: e for e in entries if isinstance(e, RepoFile)}


def _is_same(content: bytes | Path, there: RepoFile | None) -> bool:
    """Whether the hub has these bytes, by the checksum that it keeps of a file."""
    if there is None:
        return False
    if there.lfs is not None:
        is_file = isinstance(content, Path)
        found = of_file(content) if is_file else hashlib.sha256(content).hexdigest()
        return found == there.lfs.sha256
    content = content.read_bytes() if isinstance(content, Path) else content
    blob = b"blob %d\0%b" % (len(content), content)
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == there.blob_id


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub's client raises, as an OSError that says what to do; its messages hold no token."""
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no such revision.") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"There is no such folder in the repository: {repo}.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"There is no {repo}, or you may not see it. {LOG_IN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = LOG_IN if status in (401, 403) else "Try again later."
        if status in (409, 412):
            remedy = "The repository has changed meanwhile; try again."
        raise OSError(f"The hub refuses {repo} with status {status}. {remedy}") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise OSError(f"The hub cannot be reached for {repo} ({type(error).__name__}).") from error
