#!/usr/bin/env bash
# Score a generator by GenEval's rules: on prompts about scenes with an exact detector, or on GenEval's own prompts.
#
#   bash scripts/eval_geneval.sh [key=value ...]
#
# Scenes (the default):
#   model=runs/generation                   run directory, model folder or hub id; made first when there is none
#   tokenizer=FOLDER                        its visual tokenizer, where it has moved since training
#   sprites=shapes                          shapes or emoji
#   output=runs/evaluation/generation.json  where the scores go
#   images=runs/evaluation/images       where the images go
#   nproc=N                                 processes; the numbers do not depend on it
#
# GenEval itself, when one of these is given:
#   prompts_only=true                       just write evaluation_metadata.jsonl into out=
#   images=FOLDER                           score images that anybody drew: 00000/metadata.jsonl, 00000/samples/00000.png …
#   detector=mmdet                          mmdet (GenEval's own weights), transformers (others), scenes
#   seed=43                                 of the prompts: 43 the official 553, any other a fresh suite
# with
#   model=MODEL                             draw with this generator
#   out=runs/evaluation/geneval             where everything goes
#   weights=FILE clip=FOLDER                of the detector and of CLIP, which names the colours
#   captions=SOURCE                         training captions to look for the prompts in
#   nproc=N                                 processes; the numbers do not depend on it
#
# Paths are relative to the repository. All keys: python -m vqrae.eval.geneval.evaluate --help; docs/text_to_image_evaluation.md
. "$(dirname "$0")/lib.sh"
config="" nproc=1
read_arguments "$@"
install
if given prompts_only >/dev/null || given images >/dev/null || given detector >/dev/null || given seed >/dev/null; then
  defaults out=runs/evaluation/geneval
  launch vqrae.eval.geneval.evaluate
fi
artefact model generation train_ar_gen.sh
defaults output=runs/evaluation/generation.json images=runs/evaluation/images
launch vqrae.eval.geneval.scenes
