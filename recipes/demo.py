"""python -m glam_ext.recipes.demo [--out runs/demo] [--section.field=value ...]

The whole chain on Jane Austen's novels, minutes on two cores: tokenizer, training of a small mixture of experts,
held-out bits per byte beside compressors and an n-gram model, a sampled paragraph, export, and the C++ program that
continues the same prompt without Python. `make demo` builds everything first.

An interrupted demo goes on where it stopped; a finished one starts anew. Everything is under --out; result.json has the
numbers. Exit status: 0 if the model beats xz, alone and after the training text, and C++ prints Python's text; 75 if
training was stopped and saved; 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import glam_ext
from glam_ext.data import BOS, Tokenizer
from glam_ext.evaluation.baselines import compare
from glam_ext.recipes import evaluate, export, generate, prepare_text, pretrain
from glam_ext.training.metrics import duration

TRAIN, HELDOUT = ["austen"], ["austen:heldout"]
CONFIG = Path(__file__).parent / "configs" / "debug.toml"
PROGRAM = Path(glam_ext.__file__).parents[1] / "examples" / "deploy_cpp"
PROMPT = "It was the opinion of the whole family that"
SAMPLING = ["--max-new-tokens", "120", "--temperature", "0.8", "--top-p", "0.95", "--seed", "1"]


class Stages:
    """Headings, and how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"\n=== {len(self.seconds) + 1}. {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class Failed(Exception):
    """A stage did not work; carries the exit status."""

    def __init__(self, what: str, status: int = 1) -> None:
        super().__init__(what)
        self.status = status


def demo(out: Path, overrides: Sequence[str]) -> int:
    stages = Stages()
    data, run, archive, program, result = (
        out / name for name in ("data", "model", "model.pt", "deploy_cpp", "result.json")
    )
    tokenizer = data / "tokenizer.model"
    if result.exists():
        for folder in (data, run, program):
            shutil.rmtree(folder, ignore_errors=True)
        result.unlink()

    with stages.stage("Environment"):
        info = glam_ext.build_info()
        cpu = info["backends"]["cpu"]
        print(f"glam_ext {info['version']}, torch {info['torch_running']}, Python {info['python']}, {info['compiler']}")
        print(f"CPU kernels {cpu['isa_active']} (compiled: {', '.join(cpu['isa_compiled'])}), {os.cpu_count()} cores")

    with stages.stage("Text: tokenizer and packed rows"):
        sources = ["--train", *TRAIN, "--heldout", *HELDOUT]
        sizes = ["--vocab-size", "4096", "--sequence-length", "256"]
        expect(prepare_text.main([*sources, *sizes, "--out", str(data), "--overwrite"]), "the text")

    with stages.stage("Training"):
        places = [f"--data.train={data / 'train'}", f"--data.heldout={data / 'heldout'}"]
        names = [f"--run.folder={out}", f"--run.name={run.name}"]
        expect(pretrain.main([str(CONFIG), *places, *names, *overrides]), "training")

    with stages.stage("Held-out bits per byte"):
        text = captured(evaluate.main, [str(run), "--data", str(data / "heldout"), "--json"])
        model = json.loads(text)
        packed = captured(evaluate.main, [str(run), "--data", str(data / "heldout"), "--json", "--weights", "int8"])
        ours = {
            "this model": model["bits_per_byte"],
            "this model with int8 weights": json.loads(packed)["bits_per_byte"],
        }
        results = {**ours, **compare(TRAIN, HELDOUT, data)}
        for name, bits in sorted(results.items(), key=lambda item: item[1]):
            print(f"{bits:8.3f}  {name}")
        rivals = [bits for name, bits in results.items() if name.startswith("xz")]
        wins = model["bits_per_byte"] < min(rivals)
        print(f'"Persuasion", which it never saw: the model {"beats" if wins else "DOES NOT BEAT"} xz both ways.')

    with stages.stage("A sample"):
        sample = captured(generate.main, [str(run), "--tokenizer", str(tokenizer), "--prompt", PROMPT, *SAMPLING])
        print(sample)

    with stages.stage("Export for C++"):
        expect(export.main([str(run), "--out", str(archive), "--tokenizer", str(tokenizer)]), "the export")

    with stages.stage("The C++ program, without Python"):
        same = continue_in_cpp(program, run, archive, tokenizer, sample)

    total = sum(stages.seconds.values())
    print("\n" + "\n".join(f"{duration(seconds):>8}  {name}" for name, seconds in stages.seconds.items()))
    print(f"{duration(total):>8}  in all after the build; everything is in {out}")
    numbers = {"bits_per_byte": results, "beats_xz": wins, "cpp_prints_the_same": same, "seconds": stages.seconds}
    result.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0 if wins and same is not False else 1


def continue_in_cpp(build: Path, run: Path, archive: Path, tokenizer: Path, sample: str) -> bool | None:
    """Builds examples/deploy_cpp, runs it, and says whether its output is Python's; None if it is not to be had."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not PROGRAM.is_dir() or cmake is None:
        print(f"left out: {PROGRAM if cmake else 'cmake'} is not here; it comes with the sources (make demo)")
        return None
    places = ["-S", str(PROGRAM), "-B", str(build), f"-DCMAKE_PREFIX_PATH={glam_ext.cmake_prefix_path}"]
    output_of([cmake, *places, "-DCMAKE_BUILD_TYPE=Release"])
    output_of([cmake, "--build", str(build)])
    program = str(build / "deploy")
    if "token ids only" not in output_of([program, "--help"]):
        command, expected = [program, str(archive), "--prompt", PROMPT, *SAMPLING], sample
    else:
        print("SentencePiece's C++ library is not here (Debian: libsentencepiece-dev), so token ids in and out:")
        ids = ",".join(map(str, [BOS, *Tokenizer.load(tokenizer).encode(PROMPT)]))
        command = [program, str(archive), "--tokens", ids, *SAMPLING]
        expected = captured(generate.main, [str(run), "--tokens", ids, *SAMPLING])
    print("$ " + shlex.join(command), flush=True)
    printed, speed = run_program(command)
    print(f"{printed}\n{speed}")
    same = printed.strip() == expected.strip()
    print("That is Python's output, character for character." if same else "That IS NOT Python's output.")
    return same


def run_program(command: Sequence[str]) -> tuple[str, str]:
    """What a command prints and what it reports on stderr, run without Python's variables."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise Failed(f"{shlex.join(command)} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr.strip()


def output_of(command: Sequence[str]) -> str:
    return run_program(command)[0]


def captured(main: object, argv: list[str]) -> str:
    assert callable(main)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(argv)
    expect(status, " ".join(argv))
    return output.getvalue()


def expect(status: int, what: str) -> None:
    if status:
        raise Failed(f"{what} ended with status {status}", status)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description="Train, compare, sample and export a small model.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="(default %(default)s)")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        return demo(arguments.out, overrides)
    except Failed as failure:
        print(f"demo: {failure}", file=sys.stderr)
        return failure.status


if __name__ == "__main__":
    sys.exit(main())
