"""Training over many processes."""

from glam_ext.distributed.ranks import ONE_PROCESS, Ranks

__all__ = ["ONE_PROCESS", "Ranks"]
