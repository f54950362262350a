"""A second renderer, written as the reference prepares a sample: strings with tokens in them, then ids, then labels.

It knows nothing of ivl.processing.chat. A row is the dict of a jsonl line, a prompt is made of (question, reply) pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
CONTROL = re.compile(r"(<\|im_start\|>|<\|im_end\|>|</?img>|<IMG_CONTEXT>|</?(?:quad|ref|box)>)")
IGNORE = -100


class NaiveRenderer:
    """A vocabulary of the tokenizers library, the id that starts a sequence or None, and the vision tokens of a tile."""

    def __init__(self, backend: Any, bos: int | None, tokens_per_tile: int) -> None:
        self.backend, self.bos, self.tokens_per_tile = backend, bos, tokens_per_tile

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in CONTROL.split(text):
            if CONTROL.fullmatch(piece):
                ids.append(self.backend.token_to_id(piece))
            elif piece:
                ids += self.backend.encode(piece, add_special_tokens=False).ids
        return ids

    def image(self, num_tiles: int) -> str:
        return "<img>" + "<IMG_CONTEXT>" * (num_tiles * self.tokens_per_tile) + "</img>"

    def row(self, row: dict[str, Any], tiles: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids of a row, and for each whether it is trained: itself, or -100. tiles: of each image, or 1 for each frame."""
        turns = [dict(turn) for turn in row["conversations"]]
        system = turns.pop(0)["value"] if turns[0]["from"] == "system" else SYSTEM
        frames = "\n".join(f"Frame-{n}: <image>" for n in range(1, len(tiles) + 1)) + "\n"
        if row.get("video"):
            if not any("<video>" in turn["value"] for turn in turns if turn["from"] == "human"):
                turns[0]["value"] = "<video>\n" + turns[0]["value"]
            # A question may speak of images: its own letters must not be taken for the frames.
            for turn in turns:
                if turn["from"] == "human":
                    turn["value"] = turn["value"].replace("<image>", "\0").replace("<video>\n", frames, 1)
        elif row.get("image") and not any("<image>" in turn["value"] for turn in turns if turn["from"] == "human"):
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        left = list(tiles) if row.get("image") or row.get("video") else []
        ids = [] if self.bos is None else [self.bos]
        labels = [IGNORE] * len(ids)
        segments = [("system", system), *(({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in turns)]
        for role, text in segments:
            while role == "user" and left and "<image>" in text:
                text = text.replace("<image>", self.image(left.pop(0)), 1)
            segment = self.encode(f"<|im_start|>{role}\n{text}<|im_end|>\n".replace("\0", "<image>"))
            if role == "assistant":
                head = len(self.encode("<|im_start|>assistant\n"))
                labels += [IGNORE] * head + segment[head:-1] + [IGNORE]
            else:
                labels += [IGNORE] * len(segment)
            ids += segment
        assert not left
        return ids, labels

    def prompt(self, system: str | None, turns: Sequence[tuple[str, str | None]], tiles: Sequence[int]) -> list[int]:
        """Ids of questions and replies up to the next reply, whose text is None."""
        text = f"<|im_start|>system\n{SYSTEM if system is None else system}<|im_end|>\n"
        for question, reply in turns:
            text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if reply is None else f"{reply}<|im_end|>\n"
        for num_tiles in tiles:
            text = text.replace("<image>", self.image(num_tiles), 1)
        return ([] if self.bos is None else [self.bos]) + self.encode(text)
