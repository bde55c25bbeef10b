"""DPG-Bench: dense prompts, judged by questions about their images."""
