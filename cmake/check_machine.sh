#!/usr/bin/env bash
# Checks, before anything is installed, what cannot be installed with pip; names everything that is missing at once.
# Usage: check_machine.sh PYTHON
set -u
python=${1:-python3}
missing=()

if ! command -v "$python" >/dev/null; then
  missing+=("$python (Python 3.10 or newer)")
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    missing+=("Python 3.10 or newer ($python is $("$python" -c 'import platform; print(platform.python_version())'))")
  "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=("the venv module of $python (Debian: python3-venv)")
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    missing+=("the C headers of $python (Debian: python3-dev)")
fi

compiler=${CXX:-}
if [ -z "$compiler" ]; then
  for candidate in c++ g++ clang++; do command -v $candidate >/dev/null && compiler=$candidate && break; done
fi
if [ -z "$compiler" ]; then
  missing+=("a C++20 compiler: g++ 11 or newer, or clang++ 14 or newer (Debian: g++)")
elif ! echo '#include <span>
int main() { return __cplusplus < 202002L; }' | $compiler -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
  missing+=("a C++20 compiler ($compiler does not compile C++20; name another in CXX)")
fi

[ ${#missing[@]} -eq 0 ] && exit 0
echo "glam_ext: this machine lacks:" >&2
printf '  - %s\n' "${missing[@]}" >&2
exit 1
