"""glam generate CHECKPOINT --tokenizer tokenizer.model --prompt "It is a truth" [--temperature 0.8 --top-p 0.95]

Continues a prompt, printing the text as it comes. CHECKPOINT is a checkpoint folder, or a run folder, of which the
newest good checkpoint is taken. --tokens 5,6,7 instead of --prompt works on token ids, without a tokenizer.
The same command prints the same text, and the C++ program examples/deploy_cpp prints it too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from glam_ext.checkpoint import CheckpointError, find_checkpoint, load_trainer
from glam_ext.data import BOS, EOS, DataError, Tokenizer
from glam_ext.generate import decode, generate
from glam_ext.model import INFERENCE_DTYPES, GLaM

INCOMPLETE = "\ufffd"  # what the first bytes of a character show as


def token_list(text: str) -> list[int]:
    return [int(token) for token in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam generate", description="Continue a prompt.")
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue; needs --tokenizer")
    prompt.add_argument("--tokens", type=token_list, metavar="5,6,7", help="the token ids to continue")
    parser.add_argument("--tokenizer", metavar="FILE.model", help="the model's tokenizer")
    parser.add_argument("--weights", choices=INFERENCE_DTYPES, help="pack them (default: float32, as they are)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest, 0: all (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest of this sum (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.prompt is not None and not arguments.tokenizer:
        parser.error("--prompt needs --tokenizer FILE.model (made by glam prepare or glam tokenizer train)")
    return arguments


class TextPrinter:
    """Prints the text of a growing list of tokens, each character when its last byte is there."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[int]) -> None:
        self.tokenizer, self.tokens, self.shown = tokenizer, list(tokens), 0

    def add(self, token: int | None) -> None:
        if token is not None:
            self.tokens.append(token)
        self.show(decode(self.tokenizer, self.tokens).rstrip(INCOMPLETE))

    def finish(self) -> None:
        self.show(decode(self.tokenizer, self.tokens))
        print(flush=True)

    def show(self, text: str) -> None:
        print(text[self.shown :], end="", flush=True)
        self.shown = max(self.shown, len(text))


def run(arguments: argparse.Namespace) -> None:
    # 1. The model and its tokenizer.
    folder = find_checkpoint(arguments.checkpoint)
    # The hashes have just been compared.
    model = GLaM.from_checkpoint(folder.path, hashes=False, inference=arguments.weights)
    tokenizer = None
    if arguments.tokenizer:
        tokenizer = Tokenizer.load(arguments.tokenizer)
        tokenizer.check_hash(load_trainer(folder).get("tokenizer_hash"), arguments.tokenizer)

    # 2. The prompt as ids.
    prompt = arguments.tokens
    if arguments.prompt is not None:
        assert tokenizer is not None
        prompt = [BOS, *tokenizer.encode(arguments.prompt)]
    printer = TextPrinter(tokenizer, prompt) if arguments.prompt is not None and tokenizer else None
    if printer:
        printer.add(None)

    # 3. What follows.
    start = time.perf_counter()
    (new,) = generate(
        model,
        [prompt],
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_tokens=[EOS],
        stream=(lambda tokens: printer.add(tokens[0])) if printer else None,
    )
    seconds = time.perf_counter() - start
    if printer:
        printer.finish()
    else:
        print(",".join(map(str, new)))
    print(f"{len(new)} tokens in {seconds:.2f} s, {len(new) / seconds:.1f} tokens per second", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (CheckpointError, DataError, ValueError, OSError) as error:
        print(f"glam generate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
