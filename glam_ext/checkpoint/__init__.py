"""The checkpoint folder: what a run saves, what it resumes from and what the C++ program loads.

``step-000123/`` holds config.json, model.safetensors, optimizer.safetensors, trainer.json, manifest.json (size and
SHA-256 of every file) and the empty marker COMPLETE, written last. Tensors have global names and shapes. Of several
ranks each writes its own model-00001-of-00004.safetensors and optimizer-00001-of-00004.safetensors, whose metadata says
which parts of which tensors they hold, so any layout of ranks can read what any other wrote. Nothing is ever unpickled.
"""

from glam_ext.checkpoint.convert import convert_checkpoint, convert_to_dcp
from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.folder import find_checkpoint, step_folders, step_of, verify_checkpoint
from glam_ext.checkpoint.load import Checkpoint, load_checkpoint, load_trainer
from glam_ext.checkpoint.save import save_checkpoint
from glam_ext.checkpoint.shards import Piece

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Piece",
    "convert_checkpoint",
    "convert_to_dcp",
    "find_checkpoint",
    "load_checkpoint",
    "load_trainer",
    "save_checkpoint",
    "step_folders",
    "step_of",
    "verify_checkpoint",
]
