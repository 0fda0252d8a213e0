"""python -m glam_ext.recipes.pretrain CONFIG.toml [--section.field=value ...]

Trains a GLaM model. The same command goes on where a run stopped, to the same bits.

    config       TOML with comments: recipes/configs; fields are documented in glam_ext/training/config.py
    run folder   runs/NAME/{config.toml, checkpoints/, metrics.jsonl, tb/}
    stopping     SIGTERM and SIGINT save and leave with status 75: run the command again
    status       0 finished, 75 stopped and saved, 1 an error, said in one line on stderr that names the remedy
    processes    torchrun --nproc-per-node=N -m glam_ext.recipes.pretrain CONFIG.toml; the [parallel] section says how
                 they share the work, and the result is that of one process
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Sequence

from glam_ext.checkpoint import CheckpointError
from glam_ext.data import DataError
from glam_ext.distributed import LostRankError
from glam_ext.training import ConfigError, TrainingRun, load_config, to_toml


def train(file: str, overrides: Sequence[str], dry_run: bool = False) -> int:
    is_first = os.environ.get("RANK", "0") == "0"
    log = functools.partial(print, flush=True) if is_first else lambda _: None

    # 1. The configuration, resolved: every field with its value.
    config = load_config(file, overrides)
    log(to_toml(config))

    # 2. Data, model, optimiser.
    run = TrainingRun(config, log)
    if dry_run:
        log("the configuration is possible")
        return 0

    # 3. Where it stopped, if it ever ran.
    run.resume()

    # 4. Train, evaluate, save.
    status = run.train()
    run.close()
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="glam train",
        description="Train a model from a TOML file, or go on with its run. Exit status: 0 finished, 75 stopped by "
        "SIGTERM or SIGINT and saved (run the same command again), 1 error.",
        epilog="--section.field=value replaces a field of the file, for instance --run.steps=100",
    )
    parser.add_argument("config", help="a TOML file, for instance one of recipes/configs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the same as --run.device")
    parser.add_argument("--dry-run", action="store_true", help="check the configuration and the data, train nothing")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.device:
        overrides = [*overrides, f"--run.device={arguments.device}"]
    warnings.simplefilter("always")
    try:
        return train(arguments.config, overrides, arguments.dry_run)
    except (ConfigError, DataError, CheckpointError, LostRankError, OSError) as error:
        print(f"glam train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
