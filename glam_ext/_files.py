"""What every writer of files here needs of the system."""

from __future__ import annotations

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Returns once a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
