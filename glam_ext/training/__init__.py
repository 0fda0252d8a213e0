"""Training: configuration, one step's loss and gradients, the update, metrics, and the run that puts them together."""

from glam_ext.training.config import ConfigError, TrainingConfig
from glam_ext.training.loop import TrainingRun
from glam_ext.training.signals import EXIT_INTERRUPTED
from glam_ext.training.step import StepSums, accumulate_gradients
from glam_ext.training.toml_files import decode, load_config, to_tables, to_toml

__all__ = [
    "EXIT_INTERRUPTED",
    "ConfigError",
    "StepSums",
    "TrainingConfig",
    "TrainingRun",
    "accumulate_gradients",
    "decode",
    "load_config",
    "to_tables",
    "to_toml",
]
