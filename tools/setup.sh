#!/bin/sh
# Called by `make setup`: a virtual environment with requirements.txt, and FFCV where its headers are or can be had.
# Reads PYTHON, VENV and APT. Safe to run again.
set -eu

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: $PYTHON is $("$PYTHON" -V 2>&1); Python 3.11 or 3.12 is needed: make setup PYTHON=python3.12" >&2
    exit 2
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
    echo "error: no virtual environment could be made: apt-get install python3-venv, then run this again" >&2
    exit 2
}

headers() { pkg-config --exists opencv4 libturbojpeg libjpeg 2>/dev/null && command -v g++ >/dev/null; }
line="apt-get install -y --no-install-recommends $APT"
if ! headers; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive $line -qq) >&2 || true
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        (sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive $line -qq) >&2 || true
    fi
fi

wanted=requirements.txt
if ! headers; then
    echo "notice: FFCV is left out, its headers are missing: sudo $line && rm $VENV/.installed && make setup" >&2
    wanted="$VENV/requirements-without-ffcv.txt"
    grep -v '^ffcv' requirements.txt >"$wanted"
fi

# FFCV's build and, on Python 3.12, its imports need setuptools.
"$VENV/bin/python" -m pip install -q --upgrade pip "setuptools>=77" wheel
"$VENV/bin/python" -m pip install -q -r "$wanted"
"$VENV/bin/python" -m pip install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -m pipeline.native || echo "notice: Pillow decodes instead, several times slower: sudo apt-get install libjpeg-dev gcc" >&2
"$VENV/bin/daae" doctor || echo "notice: see the lines marked above; the rest works" >&2
