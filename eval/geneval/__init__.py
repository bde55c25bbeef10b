"""GenEval: prompts, folders, detectors, rules and scores, without mmdetection."""
