"""GLaM as a PyTorch extension: ops (torch.ops.glam.*), a LibTorch model, training and export."""

from glam_ext import _C

__version__: str = _C.build_info()["version"]
