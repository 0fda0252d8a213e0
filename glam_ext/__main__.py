"""The command `glam`, also `python -m glam_ext`: a door to the modules that do the work.

A sub-command is a module with `main(argv)`; it is imported only when called, and its own parser reads the rest of the
line.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("glam_ext.recipes.pretrain", "train a model from a TOML file, or resume its run"),
    "prepare": ("glam_ext.recipes.prepare_text", "tokenise and pack text files"),
    "tokenizer": ("glam_ext.recipes.tokenizer", "train a SentencePiece tokenizer, encode and decode text"),
    "evaluate": ("glam_ext.recipes.evaluate", "nats, perplexity and bits per byte of a checkpoint on held-out text"),
    "generate": ("glam_ext.recipes.generate", "continue a prompt"),
    "export": ("glam_ext.recipes.export", "write a TorchScript archive for C++ programs"),
    "inspect": ("glam_ext.recipes.inspect_model", "parameters, FLOPs and memory of a preset or configuration"),
    "verify": ("glam_ext.checkpoint.verify", "check the files of a checkpoint folder and that nothing is lost"),
    "convert": ("glam_ext.recipes.convert", "write a checkpoint for another number of ranks, or for DCP"),
    "doctor": ("glam_ext.doctor", "what this installation is and whether it works here"),
}


def available() -> dict[str, tuple[str, str]]:
    """The sub-commands whose module is installed. Looks at files: importing the parent packages would load torch."""
    package = Path(__file__).parent

    def exists(module: str) -> bool:
        return package.joinpath(*module.split(".")[1:]).with_suffix(".py").exists()

    return {name: entry for name, entry in COMMANDS.items() if exists(entry[0])}


def usage() -> str:
    lines = ["usage: glam COMMAND [options]; glam COMMAND --help", ""]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in available().items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; returns its exit status (2: no such command)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = arguments
    commands = available()
    if name not in commands:
        print(f"glam: expected a command out of {', '.join(commands)}, got {name}", file=sys.stderr)
        return 2
    return importlib.import_module(commands[name][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
