"""Several files replaced as one, one file replaced atomically."""

from __future__ import annotations

import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PENDING = ".fastlora-pending"  # complete files that are about to replace those beside this folder
_UNFINISHED = ".fastlora-{}.tmp"
_ATTEMPTS = 100


def replace_together(folder: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Write ``contents`` (name -> bytes) into a folder, which is made if need be; the last name is the marker.

    All files are written and flushed in a subfolder, whose renaming to ``PENDING`` is the moment of the change:
    ``read_together`` looks there first. Then they move to their places; the old marker goes before, unless it stays the
    same, so that readers who do not know ``PENDING`` find the files of one save or no marker.

    Raises ``OSError`` naming the folder and the file, with what was there unchanged: a full disk, missing rights.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as alone:
        if alone:
            for leftover in folder.glob(_UNFINISHED.format("*")):
                shutil.rmtree(leftover, ignore_errors=True)
        _publish(folder, list(contents))
        unfinished = folder / _UNFINISHED.format(uuid.uuid4().hex)
        try:
            _write(unfinished, contents)
            os.rename(unfinished, folder / PENDING)
        except OSError as error:
            name = pathlib.Path(error.filename or folder).name
            text = f"{error.strerror}, while saving {name}; what was there before is unchanged"
            raise OSError(error.errno, text, str(folder)) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
        _sync(folder)
        _publish(folder, list(contents))


def read_together(
    folder: pathlib.Path, names: Sequence[str], most: Mapping[str, int] | None = None
) -> dict[str, bytes | None]:
    """The files of one ``replace_together``, None for one that is not there; also while another process writes.

    What is no regular file (a pipe, a device, a folder) is not there; links are followed. Raises ``ValueError`` for a
    file of more bytes than ``most`` says of its name, before any of them is read, ``OSError`` for one that cannot be
    read, ``RuntimeError`` for a folder that never rests.
    """
    most = most or {}
    for _ in range(_ATTEMPTS):
        before = _each(folder, names, _stamp)
        found = _each(folder, names, lambda path: _content(path, most.get(path.name)))
        if before is not None and found is not None and _each(folder, names, _stamp) == before:
            return found
    raise RuntimeError(f"{folder}: its files are being replaced all the time")


def _write(unfinished: pathlib.Path, contents: Mapping[str, bytes]) -> None:
    unfinished.mkdir()
    for name, content in contents.items():
        try:
            with open(unfinished / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, name) from error
    _sync(unfinished)


def _publish(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Move what is pending to its place; an interrupted earlier save is finished by the next."""
    pending, marker = folder / PENDING, names[-1]
    if not pending.is_dir():
        return
    old, new = folder / marker, pending / marker
    if old.is_file() and new.is_file() and old.read_bytes() != new.read_bytes():
        old.unlink()
        _sync(folder)
    for name in names:
        if (pending / name).is_file():
            os.replace(pending / name, folder / name)
    _sync(folder)
    pending.rmdir()
    _sync(folder)


def _each(folder: pathlib.Path, names: Sequence[str], look: Callable[[pathlib.Path], Any]) -> dict[str, Any] | None:
    """What ``look`` finds of every file, None for one that is not there; None at all if one moved under its eyes."""
    found = {}
    for name in names:
        pending = (folder / PENDING / name).is_file()
        if not pending and not (folder / name).is_file():
            found[name] = None
            continue
        try:
            found[name] = look(folder / PENDING / name if pending else folder / name)
        except FileNotFoundError:
            if pending:
                return None
            found[name] = None
    return found


def _content(path: pathlib.Path, most: int | None) -> bytes:
    size = path.stat().st_size
    if most is not None and size > most:
        raise ValueError(f"{path}: has {size} bytes, expected at most {most}")
    return path.read_bytes()


def _stamp(path: pathlib.Path) -> tuple[int, ...]:
    """What changes when a file's content does, and not when the file is moved to its place."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size


@contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
    """Keep other savers of this folder out, where the system can; a killed process lets go by itself."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _sync(folder: pathlib.Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Written under a temporary name, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
