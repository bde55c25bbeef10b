#!/usr/bin/env bash
# Score an understanding model: on questions about scenes, with the image and without (blind), or through lmms-eval.
#   bash scripts/eval_understanding.sh [model=runs/understanding] [sprites=shapes] [key=value ...]             scenes
#   bash scripts/eval_understanding.sh model=MODEL benchmark=paper|pope,gqa,... [data=FOLDER] [limit=N]        lmms-eval
# The same command continues. docs/understanding.md
. "$(dirname "$0")/lib.sh"
case " $* " in
*" benchmark="*) launch eval.understanding.evaluate "$@" ;;
*) launch quickstart.scene_questions "$@" ;;
esac
