#!/usr/bin/env bash
# Kill every job again and again, run the same command, and compare with a run that was never killed (docs/reliability.md).
#   bash scripts/check_kill.sh [jobs=all|NAME,NAME] [kills=8] [seed=0] [output=runs/check_kill]
# The models are tiny and random; on two CPU cores all jobs take about an hour. Exit code 0: nothing was lost.
. "$(dirname "$0")/lib.sh"
launch scripts.check_kill "$@"
