#!/usr/bin/env bash
# Train and score every row of an ablation: codebook dimension and size, training strategy, quantizer, locality.
#   bash scripts/ablate.sh [suite=all|width|size|table6|quantizers|locality|FILE.yaml] [seeds=1] [data=scenes] [key=value ...]
# Claims need at least two seeds. The same command resumes: finished runs are not repeated. docs/ablations.md
. "$(dirname "$0")/lib.sh"
launch eval.ablations.evaluate "$@"
