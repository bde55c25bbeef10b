#!/usr/bin/env bash
# Install the wheel with each extra alone into an empty environment outside the repository, and import all that it is for.
#   bash scripts/check_install.sh [extras=all|base,eval,demo,…] [python=python3.11,python3.13] [constraints=yes]
# With uv if it is on PATH, else pip. Each environment is removed after its check; the first downloads about 3 GB.
. "$(dirname "$0")/lib.sh"
launch scripts.check_install "$@"
