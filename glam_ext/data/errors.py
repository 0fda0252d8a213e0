"""The one exception of glam_ext.data: what is wrong, in which file (and line), and what to do about it."""

from __future__ import annotations


class DataError(ValueError):
    """A corpus, tokenizer or token folder that cannot be used as it is. The message names the file and the remedy."""
