"""Understanding benchmarks, through lmms-eval and VLMEvalKit."""
