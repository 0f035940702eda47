"""Write a folder, or a file, whole or not at all: into a new one beside it, which then takes its name.

At every moment the target is the old folder or the new one. Replacing takes two renames; a machine that
stops between them leaves the old folder as ".<name>.<random>.old" beside the target, one that stops while
writing leaves ".<name>.<random>.new", of a file ".<name>.<random>.partial".
"""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PARTIAL = ".partial"


@contextmanager
def staged(target: Path, is_replaced: Callable[[str], bool]) -> Iterator[Path]:
    """Yield a new folder to write into; at the end it takes the place of `target`.

    Args:
        target: the folder to make or replace.
        is_replaced: whether a file of the old folder, by its name, goes with it; others that were not
            written anew are kept, as hard links where the file system has them.

    Raises:
        OSError: writing failed; `target` is as it was.
    """
    folder = _sibling(target, "new")
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.is_dir():
            _keep_others(target, folder, is_replaced)
        _replace(target, folder)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"saving failed, nothing was changed: {error}", str(target)) from error
    except OSError as error:
        reason = f"saving failed, nothing was changed: {error.strerror or error}"
        raise OSError(error.errno or errno.EIO, reason, str(target)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Yield a path to write a file to; at the end, written to the disk, it takes the name `target`.

    Raises:
        OSError: writing failed; `target` is as it was.
    """
    partial = _sibling(target, PARTIAL.lstrip("."))
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"writing failed, nothing was changed: {error}", str(target)) from error
    finally:
        partial.unlink(missing_ok=True)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Check that the file system of `folder`, which need not exist yet, has room.

    Raises:
        OSError: it has not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        needed, left = (f"{n / 2**20:.0f} MiB" for n in (needed_bytes, free))
        raise OSError(
            errno.ENOSPC, f"the model needs {needed}, {left} are free; nothing was changed", str(folder)
        )


def _sibling(target: Path, suffix: str) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.{suffix}"


def _keep_others(old: Path, new: Path, is_replaced: Callable[[str], bool]) -> None:
    for entry in old.iterdir():
        if is_replaced(entry.name) or (new / entry.name).exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, to: str | Path) -> None:
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, to, follow_symlinks=False)


def _replace(target: Path, folder: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    old = _sibling(target, "old")
    target.rename(old)
    try:
        folder.rename(target)
    finally:
        if not target.exists():
            old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
