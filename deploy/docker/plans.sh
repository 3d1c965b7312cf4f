#!/bin/sh
# TensorRT plans for this machine's GPU, and the model repository that is served from them. What is fresh is kept.
#
#   plans.sh PLANS REPOSITORY
set -eu
talksplat-export tensorrt --plans "$1"
talksplat-export derive tensorrt --output "$2" --plans "$1"
