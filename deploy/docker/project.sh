#!/bin/sh
# This project into an environment of environment.sh: compiles the rasterizer, and leaves the sources where they are,
# since models, configurations and avatars are found beside them.
#
#   project.sh VENV PROJECT...
set -eu
venv=$1
shift
for project in "$@"; do
  PIP_CONSTRAINT=constraints.txt "$venv/bin/python" -m pip install --disable-pip-version-check --no-deps -e "$project"
done
