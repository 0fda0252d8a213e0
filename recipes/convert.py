"""glam convert SOURCE OUT [--ranks N | --to dcp]

Writes a checkpoint again: in one file per kind (the default), as N ranks would have saved it, or in the format of
torch.distributed.checkpoint. No layout of ranks needs this to load a checkpoint. SOURCE is a checkpoint folder, or a
run folder, of which the newest good checkpoint is taken; OUT is a name that is free. Weights, optimiser state and
trainer.json go along. OUT appears whole or not at all; a problem ends in one line on stderr and exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from glam_ext.checkpoint import CheckpointError, convert_checkpoint, convert_to_dcp, find_checkpoint


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam convert", description="Write a checkpoint in another layout or format.")
    parser.add_argument("source", help="a checkpoint folder or a run folder")
    parser.add_argument("out", help="the folder to write")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ranks", type=int, default=1, metavar="N", help="files of N ranks (default: %(default)s)")
    form.add_argument("--to", choices=["dcp"], help="dcp: torch.distributed.checkpoint")
    arguments = parser.parse_args(argv)
    if arguments.ranks < 1:
        parser.error("expected --ranks to be at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    source = find_checkpoint(arguments.source)
    if arguments.to == "dcp":
        out = convert_to_dcp(source, arguments.out)
    else:
        out = convert_checkpoint(source, arguments.out, arguments.ranks)
    written = [file for file in out.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in written)
    print(f"{source.path} -> {out}: {len(written)} files, {size:,} bytes")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (CheckpointError, OSError) as error:
        print(f"glam convert: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
