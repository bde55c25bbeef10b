#!/usr/bin/env bash
# Kill every job again and again, run the same command, and compare with a run that nobody touched (docs/reliability.md).
#
#   bash scripts/check_kill.sh [key=value ...]
#
#   jobs=all                 names with commas between them: encoder, tokenizer, llm, llava, codes, generator, answers, generate,
#                            and on two processes codes_x2, tokenizer_x2, llava_x2, llava_x2_zero, generator_x2_zero
#   kills=8                  of each job
#   seed=0                   of the moments
#   output=runs/check_kill   tiny models, what failures left, report.json
#
# The models are tiny and random; on two CPU cores all jobs take about an hour. The exit code is 0 when nothing was lost.
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install deepspeed
launch vqrae.scripts.check_kill
