"""A folder that appears whole or not at all.

Files are written into a hidden folder beside the final one, synced, and moved into place by a rename. If anything goes
wrong before that (a full disk, an exception, Ctrl-C), the hidden folder is removed and the final one is as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glam_ext._files import fsync
from glam_ext.data.errors import DataError


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` when the block ends without an exception.

    An existing `folder` is refused before anything is written, unless it is empty or `overwrite` is set; then it is
    replaced after the new one is complete.
    """
    final = Path(folder).absolute()
    if final.exists() and not final.is_dir():
        raise DataError(f"{final}: expected a folder or a free name, found a file; choose another name")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise DataError(f"{final}: exists and is not empty; choose another name, or overwrite it (--overwrite)")
    final.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        hidden.chmod(0o777 & ~_umask())
        yield hidden
        _sync_tree(hidden)
        if final.is_dir():
            _replace(hidden, final)
        else:
            hidden.rename(final)
        fsync(final.parent)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _replace(hidden: Path, final: Path) -> None:
    """Put `hidden` where the folder `final` is. The old folder is only deleted once the new one has its name."""
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
    final.rename(aside)  # a rename onto an empty folder replaces it
    try:
        hidden.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync(Path(root) / name)
        fsync(Path(root))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
