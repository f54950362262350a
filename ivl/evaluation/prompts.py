"""Chain-of-thought prompts: a reply reasons first and ends with an answer that can be read (arXiv:2411.10442)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ivl.evaluation.scoring import AnswerStyle
from ivl.types import Conversation, Text

PromptName = Literal["published", "reference", "plain", "cot", "mpo"]
"""Prompts of benchmarks: as VLMEvalKit asks InternVL2.5, as InternVL's own evaluation code does, without any request, with
VLMEvalKit's request to reason (USE_COT), and as it asks the models trained by MPO."""
PromptLanguage = Literal["en", "zh"]
Domain = Literal["science", "visual", "grounded"]


def texts_of(folder: str) -> dict[str, str]:
    """Return the texts of a folder beside this file by name, without the line break that ends each file."""
    return {path.stem: path.read_text("utf-8").removesuffix("\n") for path in Path(__file__).with_name(folder).glob("*.txt")}


QUESTIONS = texts_of("questions")
"""Prompts of official tools, word for word."""
SHORT_ANSWER = re.compile(
    r"\s*(?:Answer the question (?:using|with) a single word or phrase\.?"
    r"|Answer with the option's letter from the given choices directly\.?"
    r"|Please answer directly with a single word or number\.?"
    r"|请直接回答选项字母。?|请用单个词或短语回答(?:问题)?。?)\s*$"
)
"""Requests for a bare answer, which would contradict the request to reason."""

REASON: dict[tuple[AnswerStyle, PromptLanguage], str] = {
    ("final_answer", "en"): (
        "Work the question out step by step before you answer. Close with a line of its own that reads "
        '"Final answer: ..." and holds nothing but the answer.'
    ),
    ("final_answer", "zh"): "请先逐步推理，再作答。最后单独一行写出“最终答案：……”，该行只写答案。",
    ("boxed", "en"): (
        "Work the question out step by step before you answer. Close with a line that reads "
        "Answer: \\boxed{...} and holds the answer alone."
    ),
    ("boxed", "zh"): "请先逐步推理，再作答。最后一行写出 答案：\\boxed{……}，括号内只写答案。",
    ("think", "en"): ("First think inside <think> and </think>, then give the answer alone inside <answer> and </answer>."),
    ("think", "zh"): "请先在 <think> 与 </think> 之间思考，再在 <answer> 与 </answer> 之间只写答案。",
}

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"
COT_CHOICE, COT_OPEN, MPO = QUESTIONS["cot-choice"], QUESTIONS["cot-open"], QUESTIONS["mpo"]

CHINESE = re.compile("[\u4e00-\u9fff]")

INSTRUCTIONS: dict[Domain, str] = {
    "science": "Begin with the background knowledge that the question rests on, then reason from it to the answer.",
    "visual": "Begin with what the picture shows that matters here, such as its text and figures, then reason from it.",
    "grounded": "Name the objects that you rely on and where in the picture they are, then answer.",
}
"""Instructions for questions without a checked answer, by the kind of picture."""


def ask(question: str, style: AnswerStyle, language: PromptLanguage = "en", domain: Domain | None = None) -> str:
    """Return the question as the model gets it. The style `direct` adds no request to reason."""
    text = question if style == "direct" else SHORT_ANSWER.sub("", question)
    extra = [INSTRUCTIONS[domain]] if domain else []
    if style != "direct":
        extra.append(REASON[style, language])
    return "\n".join([text, *extra])


def reasoned(conversation: Conversation, style: AnswerStyle) -> Conversation:
    """Add the request to reason to the last text of a conversation, in Chinese where the last turn is Chinese."""
    *before, last = conversation
    language = "zh" if CHINESE.search(last.text) else "en"
    parts = list(last.content)
    for at in reversed(range(len(parts))):
        if isinstance(part := parts[at], Text):
            parts[at] = Text(ask(part.text, style, language))
            return (*before, replace(last, content=tuple(parts)))
    return (*before, replace(last, content=(*parts, Text(ask("", style, language)))))
