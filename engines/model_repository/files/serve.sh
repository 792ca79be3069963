#!/usr/bin/env bash
# Serve the models of this folder with tritonserver, on loopback unless told otherwise.
#   ./serve.sh [--tritonserver=PATH] [any flag of tritonserver]
# e.g. ./serve.sh --http-address=0.0.0.0 --http-port=8080 --exit-timeout-secs=60
# The server is --tritonserver, or $TRITONSERVER, or the tritonserver on PATH.
ulimit -s 65536 2>/dev/null || true  # 2.51 reads HTTP bodies of some megabytes onto the stack
exec python3 "$(dirname "$(readlink -f "$0")")/supervise.py" "$@"
