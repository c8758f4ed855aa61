"""Files and folders that appear whole or not at all.

What is written goes to a scratch place beside its target that no other process knows, is flushed to the disk
and then renamed. A process that is killed leaves a folder `NAME.*.part`, which nothing ever reads.

    with whole_file(path) as part:
        part.write_text("...")
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TRIES = 20


class DiskFullError(OSError):
    """There is no room for what was to be written; nothing of it is left."""

    def __init__(self, path: Path, what: str = "it has been removed again") -> None:
        super().__init__(
            errno.ENOSPC,
            f"the disk is full: {what}. Free some space, or take a folder on another disk (C2R_CACHE and "
            "C2R_DATA move the project's own)",
            str(path),
        )


@contextlib.contextmanager
def whole_folder(folder: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """A scratch folder to fill, which becomes `folder` only when the block ends without an error.

    Its parents are made. A folder already there is replaced, at that moment and as a whole; after an error it
    is as it was before. If it may not be replaced, it must be empty, else it is a FileExistsError, also if
    another process made it meanwhile. A full disk is a DiskFullError.
    """
    folder = Path(folder)
    with _scratch(folder) as part:
        part.mkdir()
        yield part
        for path in (*part.rglob("*"), part):
            _flush(path)
        for _ in range(_TRIES):  # another process may put one there between two steps
            try:
                part.rename(folder)
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not replace:
                    raise FileExistsError(
                        errno.EEXIST,
                        "there is something already, perhaps of another process",
                        str(folder),
                    ) from error
                old = Path(tempfile.mkdtemp(prefix="old", dir=part.parent)) / folder.name
                with contextlib.suppress(FileNotFoundError):
                    folder.rename(old)
        else:
            raise OSError(errno.EBUSY, "other processes keep replacing it", str(folder))


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A scratch file to write, which becomes `path` only when the block ends without an error.

    A file already there is replaced at that moment; after an error it is as it was before. Parents are made.
    A full disk is a DiskFullError.
    """
    path = Path(path)
    with _scratch(path) as part:
        yield part
        _flush(part)
        part.replace(path)


def check_room(folder: Path, n_bytes: int) -> None:
    """Raise DiskFullError unless the disk of a folder has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise DiskFullError(folder, f"{n_bytes:,} bytes are needed, {free:,} are free")


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A path of the target's name in a private folder beside it; gone at the end, if not renamed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".part", dir=target.parent))
        try:
            yield room / target.name
            _flush(target.parent)  # the rename itself
        finally:
            shutil.rmtree(room, ignore_errors=True)
    except Exception as error:
        if _is_full(error):
            raise DiskFullError(target) from error
        raise


def _flush(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_full(error: Exception) -> bool:
    """Whether a full disk (or quota, or limit on a file's size) is the cause, whoever reports it."""
    if isinstance(error, DiskFullError):
        return False  # explained already
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)  # safetensors raises an error of its own; numpy an OSError without a number
    return "No space left on device" in text or "File too large" in text or "requested and" in text
