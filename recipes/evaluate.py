"""python -m glam_ext.recipes.evaluate CHECKPOINT --data FOLDER

Nats per token, perplexity and bits per byte of a model on a token folder (made by glam_ext.recipes.prepare_text with
the model's tokenizer). CHECKPOINT is a checkpoint folder, or a run folder, of which the newest good one is taken.
Nothing is dropped for capacity unless --capacity-factor asks for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from glam_ext.checkpoint import CheckpointError, load_checkpoint
from glam_ext.data import DataError, TokenFolder
from glam_ext.evaluation.heldout import evaluate
from glam_ext.model import INFERENCE_DTYPES, GLaM


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="glam evaluate", description="Loss of a checkpoint on held-out text.")
    parser.add_argument("checkpoint", help="a checkpoint folder or a run folder")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a token folder")
    parser.add_argument("--batch-size", type=int, default=16, metavar="ROWS", help="(default %(default)s)")
    parser.add_argument("--capacity-factor", type=float, help="slots per token; not causal (default: nothing dropped)")
    parser.add_argument("--weights", choices=INFERENCE_DTYPES, help="pack them (default: float32, as they are)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error("expected --batch-size to be at least 1")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    # 1. The model.
    checkpoint = load_checkpoint(arguments.checkpoint)
    config = dataclasses.replace(checkpoint.config, eval_capacity_factor=arguments.capacity_factor)
    model = GLaM(config)
    model.load_state_dict(checkpoint.model)
    if arguments.weights:
        model.prepare_for_inference(arguments.weights)

    # 2. The text, made with the same tokenizer.
    data = TokenFolder(arguments.data)
    expected = checkpoint.trainer.get("tokenizer_hash", data.manifest.tokenizer_hash)
    if expected != data.manifest.tokenizer_hash:
        raise DataError(
            f"{data.folder}: was made with another tokenizer than the model's (hash "
            f"{data.manifest.tokenizer_hash[:12]}, expected {expected[:12]}); prepare the text with that one"
        )

    # 3. The loss.
    loss = evaluate(model, data, arguments.batch_size)
    assert loss is not None
    if arguments.json:
        print(json.dumps({"checkpoint": str(checkpoint.path), "step": checkpoint.step, **loss.as_dict()}))
        return
    print(f"{checkpoint.path} on {data.folder}: {loss.num_tokens:,} tokens, {loss.utf8_bytes:,} bytes, {loss.capacity}")
    print(f"{loss.nats:.4f} nats per token, perplexity {loss.perplexity:.2f}, {loss.bits_per_byte:.4f} bits per byte")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        run(arguments)
    except (CheckpointError, DataError, ValueError, OSError) as error:
        print(f"glam evaluate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
