"""glam tokenizer train SOURCE... --vocab-size 4096 --out tokenizer.model
glam tokenizer encode tokenizer.model < text > ids
glam tokenizer decode tokenizer.model < ids > text

Trains a SentencePiece tokenizer with the settings that give back every text exactly (glam_ext/data/tokenizer.py), and
applies one. Ids are decimal numbers between white space; decode gives back the bytes that encode read. Sources are
those of glam prepare: .txt and .jsonl files, also as .xz, and the name austen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from glam_ext.data import Corpus, DataError, Tokenizer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam tokenizer", description="Train or apply a SentencePiece tokenizer.")
    actions = parser.add_subparsers(dest="action", required=True)
    train = actions.add_parser("train", help="learn a vocabulary from text")
    train.add_argument("sources", nargs="+", metavar="SOURCE", help="files, or the name austen")
    train.add_argument("--out", required=True, metavar="FILE.model", help="the model to write, with a .json beside it")
    train.add_argument("--vocab-size", type=int, default=32000, help="pieces to learn (default %(default)s)")
    train.add_argument("--kind", choices=("bpe", "unigram"), default="bpe", help="(default %(default)s)")
    for action, summary in (("encode", "text on stdin to ids"), ("decode", "ids on stdin to text")):
        actions.add_parser(action, help=summary).add_argument("tokenizer", metavar="FILE.model")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    if arguments.action == "train":
        tokenizer = Tokenizer.train(Corpus(arguments.sources), arguments.vocab_size, arguments.kind)
        tokenizer.save(arguments.out)
        print(f"{arguments.out}: {tokenizer.vocab_size:,} pieces, hash {tokenizer.hash[:12]}")
        return
    tokenizer = Tokenizer.load(arguments.tokenizer)
    if arguments.action == "encode":
        # Bytes, because text mode would turn CRLF into LF.
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8: {error}; convert it with iconv") from error
        print(*tokenizer.encode(text))
        return
    try:
        ids = [int(token) for token in sys.stdin.read().split()]
    except ValueError as error:
        raise DataError(f"expected token ids on standard input: {error}") from error
    sys.stdout.buffer.write(tokenizer.decode(ids).encode("utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (DataError, OSError) as error:
        print(f"glam tokenizer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
