#!/usr/bin/env bash
# Makes .venv and installs the pinned requirements, once; sourced by quickstart.sh and test.sh.
# PYTHON=python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/installed
if ! cmp -s requirements.txt "$stamp"; then
    if [[ ! -e $stamp ]]; then  # none, or one that a start before this did not finish
        python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "setup.sh: needs Python 3.11 or newer, $python is $("$python" -V 2>&1); choose with PYTHON=python3.11" >&2
            exit 2
        fi
        "$python" -m venv --clear .venv
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
fi
source .venv/bin/activate
