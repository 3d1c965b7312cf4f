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
# torch's headers are of C++20, gsplat's setup asks for 17: the last one counts. And each job takes gigabytes.
export NVCC_APPEND_FLAGS="-std=c++20" MAX_JOBS="${MAX_JOBS:-4}"
# pip's cache would give a wheel that was built for other GPUs
pip --no-cache-dir --force-reinstall --no-deps --no-build-isolation --no-binary gsplat gsplat
"$venv/bin/python" -c 'from gsplat import csrc'
