#!/bin/sh
# Called by `make setup`: a virtual environment with requirements.txt, and FFCV where its headers are or can be had.
# Reads PYTHON, VENV and APT. Safe to run again: what is there stays.
set -eu

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: $PYTHON is $("$PYTHON" -V 2>&1); Python 3.11 or 3.12 is needed: make setup PYTHON=python3.12" >&2
    exit 2
}
python="python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
pip="$VENV/bin/python -m pip"

apt() {
    echo "apt-get install -y --no-install-recommends $*"
}
install() {
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" = 0 ]; then
        root=env
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        root="sudo env"
    else
        return 1
    fi
    ($root apt-get update -qq && $root DEBIAN_FRONTEND=noninteractive $(apt "$@") -qq) >&2
}

# Debian's Python comes without ensurepip: an environment is then left half-made.
environment() {
    $pip --version >/dev/null 2>&1 || { rm -rf "$VENV" && "$PYTHON" -m venv "$VENV" >/dev/null && $pip --version >/dev/null; }
}
environment || { install "$python-venv" && environment; } || {
    echo "error: no virtual environment could be made: sudo $(apt "$python-venv"), then make setup again" >&2
    exit 2
}

python_h() { "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'; }
headers() { pkg-config --exists opencv4 libturbojpeg libjpeg 2>/dev/null && command -v g++ >/dev/null && python_h; }
python_h || APT="$APT $python-dev"
headers || install $APT || true

# FFCV's build and, on Python 3.12, its imports need setuptools.
$pip install -q --upgrade pip "setuptools>=77" wheel
required() { sed -n "s/^\($1[^ ]*\).*/\1/p" requirements.txt; }
grep -v -e '^ffcv' -e '^lightly' requirements.txt >"$VENV/requirements-plain.txt"
$pip install -q -r "$VENV/requirements-plain.txt"
# Its losses and modules need nothing of what it would bring (lightning, hydra).
$pip install -q --no-deps "$(required lightly)"
if headers && $pip install -q "$(required ffcv)"; then
    :
else
    echo "notice: FFCV is left out, since it cannot be built here: sudo $(apt $APT), then make setup again" >&2
fi
$pip install -q --no-deps --no-build-isolation -e .
"$VENV/bin/python" -m pipeline.native || echo "notice: Pillow decodes instead, several times slower: sudo $(apt libjpeg-dev gcc), then make setup again" >&2
"$VENV/bin/daae" doctor || echo "notice: see the lines marked above; the rest works" >&2
