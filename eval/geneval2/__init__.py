"""GenEval 2: compositional prompts, judged atom by atom."""
