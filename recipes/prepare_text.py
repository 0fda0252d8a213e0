"""python -m glam_ext.recipes.prepare_text --train austen --heldout austen:heldout \
    --vocab-size 4096 --sequence-length 256 --out FOLDER

Turns text into what training reads:
    FOLDER/tokenizer.model, tokenizer.json   SentencePiece BPE (or Unigram) with byte fallback, from the training text
    FOLDER/train, FOLDER/heldout             packed token files with a manifest (glam_ext/data/token_files.py)

Sources are .txt and .jsonl files ({"text": ...} per line), either also as .xz, and the names austen and austen:heldout.
FOLDER appears only when all of it is complete. Text that cannot be used (not UTF-8, empty, damaged) ends the run with
one line on stderr that names the file and the remedy, and exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from glam_ext.data import Corpus, DataError, Tokenizer, write_corpus
from glam_ext.data.atomic import atomic_folder


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam prepare", description="Train a tokenizer and write packed token files.")
    parser.add_argument("--train", nargs="+", required=True, metavar="SOURCE", help="files, or the name austen")
    parser.add_argument("--heldout", nargs="+", metavar="SOURCE", help="files, or the name austen:heldout")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to make")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces to learn (default %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="positions in a row (default %(default)s)")
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="of tokenizer (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="FILE.model", help="use this tokenizer instead of training one")
    parser.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> None:
    # 1. Find the text.
    corpora = {"train": Corpus(args.train)}
    if args.heldout:
        corpora["heldout"] = Corpus(args.heldout)

    with atomic_folder(args.out, args.overwrite) as folder:
        # 2. The tokenizer, from the training text alone.
        started = time.perf_counter()
        if args.tokenizer:
            tokenizer, verb = Tokenizer.load(args.tokenizer), "read"
        else:
            tokenizer, verb = Tokenizer.train(corpora["train"], args.vocab_size, args.kind), "trained"
        tokenizer.save(folder / "tokenizer.model")
        print(f"tokenizer: {verb}, {tokenizer.vocab_size:,} pieces, {time.perf_counter() - started:.1f} s")

        # 3. Tokens, packed into rows.
        for name, corpus in corpora.items():
            started = time.perf_counter()
            manifest = write_corpus(folder / name, corpus, tokenizer, args.sequence_length)
            print(
                f"{name}: {manifest.num_documents:,} documents, {manifest.utf8_bytes:,} bytes, "
                f"{manifest.num_targets:,} tokens ({manifest.utf8_bytes / manifest.num_targets:.2f} bytes per token), "
                f"{manifest.num_rows:,} rows of {manifest.sequence_length}, {time.perf_counter() - started:.1f} s"
            )
    print(f"written: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        prepare(parse(argv))
    except (DataError, OSError) as error:
        print(f"glam prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
