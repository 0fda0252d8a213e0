"""Training over many processes: the mesh of ranks, its process groups by name, and the gradients' sums.

The ops and the model take group names and know nothing of this package; an empty name is one process.
"""

from glam_ext.distributed.mesh import LostRankError, Mesh, init_mesh
from glam_ext.distributed.ranks import ONE_PROCESS, Ranks
from glam_ext.distributed.reducer import GradientReducer

__all__ = ["ONE_PROCESS", "GradientReducer", "LostRankError", "Mesh", "Ranks", "init_mesh"]
