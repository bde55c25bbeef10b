#!/usr/bin/env bash
# The papers' claims C1 to C8, measured with three seeds each and judged by criteria stated before: docs/claims.md
#   bash scripts/claims.sh [C1 ...] [minutes=M] [seeds=3] [nproc=N] [key=value ...]
# No name means all. No run begins after `minutes`. The same command resumes: finished runs are not repeated.
. "$(dirname "$0")/lib.sh"
names="" keys=()
for word in "$@"; do
  case $word in C[0-9]*) names="$names${names:+,}$word" ;; *) keys+=("$word") ;; esac
done
case ",$names," in *,C5,* | *,C6,* | ,,) ;; *) keys+=(tokenizer= llm= codes=) ;; esac # the others start from an encoder
launch quickstart.claims "claims=[$names]" ${keys[@]+"${keys[@]}"}
