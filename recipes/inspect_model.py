"""glam inspect 64B/64E [--vocab-size 32000] [--devices 1024]

Prints a model's parameters by part, its total and active counts beside table 4 of the paper (arXiv 2112.06905), the
forward FLOPs per token and the training memory per device. Nothing is allocated: the largest model takes milliseconds.
The model is a preset, a checkpoint folder or a config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from glam_ext.checkpoint import CheckpointError, find_checkpoint
from glam_ext.config import GLaMConfig, preset_names
from glam_ext.counts import (
    ParameterCount,
    count_parameters,
    expert_parallel_size,
    flops_per_token,
    training_memory,
)

# Total and active parameters as table 4 prints them.
TABLE_4 = {
    "0.1B": ("130M", "130M"),
    "0.1B/64E": ("1.9B", "145M"),
    "1.7B": ("1.7B", "1.700B"),
    "1.7B/32E": ("20B", "1.878B"),
    "1.7B/64E": ("27B", "1.879B"),
    "1.7B/128E": ("53B", "1.881B"),
    "1.7B/256E": ("105B", "1.886B"),
    "8B": ("8.7B", "8.7B"),
    "8B/64E": ("143B", "9.8B"),
    "137B": ("137B", "137B"),
    "64B/64E": ("1.2T", "96.6B"),
}
SMALL_VOCABULARY = 32_000
PAPER_GFLOPS = {"64B/64E": 180}
PAPER_SEQUENCE = 1024
UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}

VOCABULARY_NOTE = (
    "The text of the paper gives a vocabulary of 256K, but the active count of this row fits a tied vocabulary of "
    f"{SMALL_VOCABULARY:,} better; only the 64B/64E row needs 256,000. Compare with --vocab-size {SMALL_VOCABULARY}."
)
NOTES = {
    "0.1B": "The table's count is 7.8M below the computed one at a vocabulary of 32,000 (-5.7%); unexplained.",
    "0.1B/64E": "The table's active count is 7.3M below the computed one at a vocabulary of 32,000; unexplained. "
    "Its total agrees.",
    "1.7B": "The table's 1.700B is 1.4% above the computed count at a vocabulary of 32,000; unexplained.",
    "1.7B/32E": "The table's total of 20B cannot come from this row (13.96B at a vocabulary of 32,000), while its "
    "active count of 1.878B can: taken as an error of the table.",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glam inspect", description="Parameters, FLOPs and memory of a model.")
    parser.add_argument("model", help=f"a preset ({', '.join(preset_names())}), a checkpoint folder or a config.json")
    parser.add_argument("--vocab-size", type=int, help="replaces the model's vocabulary size")
    parser.add_argument("--context", type=int, default=PAPER_SEQUENCE, help="sequence length for the FLOPs (1024)")
    parser.add_argument("--devices", type=int, default=1, help="devices that share the experts")
    arguments = parser.parse_args(argv)
    if arguments.context < 1 or arguments.devices < 1:
        parser.error("expected --context and --devices to be at least 1")

    # 1. The configuration.
    try:
        config = load_config(arguments.model)
        if arguments.vocab_size is not None:
            config = dataclasses.replace(config, vocab_size=arguments.vocab_size)
    except (ValueError, OSError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1

    # 2. Parameters, beside the paper's.
    count = count_parameters(config)
    print(f"{arguments.model}: {config.to_json(indent=1)}\n")
    print_parameters(count)
    print_paper(arguments.model, config, count)

    # 3. FLOPs and memory.
    print_flops(arguments.model, config, arguments.context)
    print_memory(config, arguments.devices)
    return 0


def load_config(model: str) -> GLaMConfig:
    path = Path(model)
    if model not in preset_names():
        if path.is_file():
            return GLaMConfig.from_json(path.read_text(encoding="utf-8"))
        if path.is_dir():
            return find_checkpoint(path, hashes=False).config
    return GLaMConfig.preset(model)


def print_parameters(count: ParameterCount) -> None:
    print("parameters")
    for part, value in dataclasses.asdict(count).items():
        print(f"  {part:<14}{value:>22,}")


def print_paper(model: str, config: GLaMConfig, count: ParameterCount) -> None:
    if model not in TABLE_4:
        return
    small = count_parameters(dataclasses.replace(config, vocab_size=SMALL_VOCABULARY))
    vocabularies = [f"V = {size:,}" for size in (config.vocab_size, SMALL_VOCABULARY)]
    print(f"\n  {'beside the paper':<18}{'table 4':>10}{vocabularies[0]:>22}{vocabularies[1]:>22}")
    for label, printed, here, at_small in zip(
        ("total", "active"), TABLE_4[model], (count.total, count.active), (small.total, small.active), strict=True
    ):
        paper = float(printed[:-1]) * UNITS[printed[-1]]
        cells = [f"{value / 1e9:.4g}B ({value / paper - 1:+.1%})" for value in (here, at_small)]
        print(f"  {label:<18}{printed:>10}{cells[0]:>22}{cells[1]:>22}")
    notes = [NOTES[model]] if model in NOTES else []
    if model != "64B/64E":
        notes.append(VOCABULARY_NOTE)
    for note in notes:
        print(f"  note: {note}")


def print_flops(model: str, config: GLaMConfig, context: int) -> None:
    flops = flops_per_token(config, context / 2)
    print(f"\nforward GFLOPs per token, causal sequence of {context} (mean context {context / 2:g})")
    for part, value in dataclasses.asdict(flops).items():
        print(f"  {part:<22}{value / 1e9:>14.4f}")
    print(f"  {'total':<22}{flops.total / 1e9:>14.4f}")
    if model in PAPER_GFLOPS:
        print(
            f"  note: the total is {flops.total / 1e9:.1f}; the paper prints {PAPER_GFLOPS[model]}, "
            "below every such sum, and its accounting is not known."
        )


def print_memory(config: GLaMConfig, devices: int) -> None:
    memory = training_memory(config, devices)
    split = expert_parallel_size(config, devices)
    if devices == 1:
        print("\ntraining memory in fp32, one device, without activations")
    else:
        print(
            f"\ntraining memory in fp32 per device, {devices} devices: experts over {split}, the rest replicated, "
            "without activations"
        )
    for part, value in memory.items():
        print(f"  {part:<14}{value / 2**30:>14.3f} GiB")


if __name__ == "__main__":
    sys.exit(main())
