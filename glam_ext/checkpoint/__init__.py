"""The checkpoint folder: what a run saves, what it resumes from and what the C++ program loads.

``step-000123/`` holds config.json, model.safetensors, optimizer.safetensors, trainer.json, manifest.json (size and
SHA-256 of every file) and the empty marker COMPLETE, written last. Tensors have global names and shapes, so any layout
of processes can read what any other wrote. Nothing is ever unpickled.
"""

from glam_ext.checkpoint.folder import CheckpointError, find_checkpoint, step_folders, step_of, verify_checkpoint
from glam_ext.checkpoint.load import Checkpoint, load_checkpoint, load_trainer
from glam_ext.checkpoint.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_checkpoint",
    "load_checkpoint",
    "load_trainer",
    "save_checkpoint",
    "step_folders",
    "step_of",
    "verify_checkpoint",
]
