"""glam export CHECKPOINT --out model.pt [--tokenizer tokenizer.model]

Writes the TorchScript archive of a model, for C++ programs without Python (examples/deploy_cpp). CHECKPOINT is a
checkpoint folder, or a run folder, of which the newest good checkpoint is taken. With --tokenizer the archive carries
the tokenizer; it must be the one the model was trained with. The archive appears whole or not at all; a problem ends in
one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from glam_ext.checkpoint import CheckpointError, find_checkpoint, load_trainer
from glam_ext.data import DataError, Tokenizer
from glam_ext.export import export_torchscript
from glam_ext.model import INFERENCE_DTYPES, GLaM


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam export", description="Write a TorchScript archive for C++ programs.")
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the archive to write")
    parser.add_argument("--tokenizer", metavar="FILE.model", help="the model's tokenizer, to go into the archive")
    parser.add_argument("--weights", choices=INFERENCE_DTYPES, help="pack them (default: float32, as they are)")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    # 1. The model.
    folder = find_checkpoint(arguments.checkpoint)
    # The hashes have just been compared.
    model = GLaM.from_checkpoint(folder.path, hashes=False, inference=arguments.weights)

    # 2. Its tokenizer.
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = Tokenizer.load(arguments.tokenizer)
        tokenizer.check_hash(load_trainer(folder).get("tokenizer_hash"), arguments.tokenizer)

    # 3. The archive.
    file = export_torchscript(model, arguments.out, tokenizer)
    carried = "tokenizer inside" if tokenizer else "no tokenizer inside"
    weights = arguments.weights or "float32"
    print(f"{folder.path} -> {file}: {file.stat().st_size:,} bytes, {weights} weights, {carried}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (CheckpointError, DataError, ValueError, OSError) as error:
        print(f"glam export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
