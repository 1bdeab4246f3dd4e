#!/bin/sh
# What the Dockerfile runs, a layer each: image.sh system | project, in the project's folder.
set -eu
venv=${VENV:-/opt/venv}

case "${1:-}" in
system)  # a C++ compiler and Python's headers are for torch.compile
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    ;;
project)
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --no-cache-dir -c constraints.txt "setuptools>=77"
    "$venv/bin/python" -m pip install --no-cache-dir -c constraints.txt --no-build-isolation -e ".[notebooks,eval]"
    "$venv/bin/python" -m repae_lite --version
    ;;
*)
    echo "image.sh: say what to install: system or project" >&2
    exit 2
    ;;
esac
