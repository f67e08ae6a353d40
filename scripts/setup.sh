#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements, once; sourced by quickstart.sh and test.sh.
# PYTHON=python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed
if ! cmp -s requirements.txt "$stamp"; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
fi
source .venv/bin/activate
