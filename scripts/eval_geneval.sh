#!/usr/bin/env bash
# Score a generator by GenEval's rules: on prompts about scenes with an exact detector, or on GenEval's own prompts.
#   bash scripts/eval_geneval.sh [model=runs/generation] [sprites=shapes] [key=value ...]                    scenes
#   bash scripts/eval_geneval.sh [prompts_only=true | model=MODEL | images=FOLDER] detector=mmdet [out=FOLDER]   GenEval
# docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
case " $* " in
*" prompts_only="* | *" images="* | *" detector="* | *" seed="*) launch eval.geneval.evaluate "$@" ;;
*) launch eval.geneval.scenes "$@" ;;
esac
