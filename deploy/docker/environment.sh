#!/bin/sh
# The environment of an image, without this project's own code: that changes more often than what it stands on.
#
#   environment.sh VENV PROJECT... [--without NAME...]     projects as requirements.py takes them
#
# Runs in a checkout, in Docker or not. PYTHON names the interpreter; pip's own variables (PIP_...) say where packages are.
set -eu
venv=$1
shift
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
list=$(mktemp)
trap 'rm -f "$list"' EXIT
"$venv/bin/python" deploy/docker/requirements.py "$@" > "$list"
"$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -r "$list"
