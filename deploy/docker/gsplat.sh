#!/bin/sh
# gsplat with its CUDA kernels compiled for the GPUs of TORCH_CUDA_ARCH_LIST. PyPI's wheel brings sources, which the first
# picture would compile, for minutes, by a compiler that the server's image doesn't have.
#
#   gsplat.sh VENV      needs nvcc of the CUDA that VENV's torch was built with
set -eu
venv=$1
: "${TORCH_CUDA_ARCH_LIST:?which GPUs, such as 8.9}"
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt "$@"; }
pip setuptools wheel ninja
# pip's cache would give a wheel that was built for other GPUs
pip --no-cache-dir --force-reinstall --no-deps --no-build-isolation --no-binary gsplat gsplat
"$venv/bin/python" -c 'from gsplat import csrc'
