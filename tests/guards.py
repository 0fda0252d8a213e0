"""How long tests wait for what might never end: far beyond what a slow machine takes, and no test is about it."""

from __future__ import annotations

PROCESS_SECONDS = 900.0
COLLECTIVE_SECONDS = 300.0
