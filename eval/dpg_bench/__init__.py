"""DPG-Bench (ELLA, Hu et al., arXiv 2403.05135; prompts and questions Apache-2.0): dense prompts, judged by questions."""

from vqrae.eval.dpg_bench.questions import Item, Question, read_questions, write_questions
from vqrae.eval.dpg_bench.scores import Answers, is_yes, official_scores, summarize

__all__ = [
    "Answers",
    "Item",
    "Question",
    "is_yes",
    "official_scores",
    "read_questions",
    "summarize",
    "write_questions",
]
