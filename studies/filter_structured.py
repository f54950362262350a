"""Answers that naive filters drop, for `studies.filter_clean`: lists, tables, code, verse, formulas, boxes, Chinese."""

from __future__ import annotations

import random

NOUNS = (
    "river",
    "mountain",
    "garden",
    "window",
    "teacher",
    "bridge",
    "letter",
    "engine",
    "forest",
    "market",
    "planet",
    "violin",
    "harbour",
    "kitchen",
    "candle",
)
ADJECTIVES = ("old", "quiet", "bright", "narrow", "heavy", "green", "distant", "simple", "broken", "golden", "early", "warm")


def _count(rng: random.Random, n: int) -> tuple[str, str]:
    start, step, size = rng.randint(0, 500), rng.choice((1, 1, 2, 5, 10)), rng.randint(4, 60)
    return f"Count from {start} in steps of {step}.", rng.choice((", ", " ", "\n")).join(
        str(start + step * i) for i in range(size)
    )


def _table(rng: random.Random, n: int) -> tuple[str, str]:
    names = rng.sample(NOUNS, rng.randint(3, 8))
    rows = [f"| {name} | {rng.randint(0, 99)} | {rng.choice(('yes', 'no'))} |" for name in names]
    return "Make a table.", "\n".join(["| Name | Count | Sold |", "| --- | --- | --- |", *rows])


def _bare_table(rng: random.Random, n: int) -> tuple[str, str]:
    rows = [",".join(str(rng.choice((0, 0, 1, rng.randint(2, 300)))) for _ in range(6)) for _ in range(rng.randint(3, 12))]
    return f"Give me test data {n}.", "a,b,c,d,e,f\n" + "\n".join(rows)


def _code(rng: random.Random, n: int) -> tuple[str, str]:
    a, b = rng.sample(NOUNS, 2)
    body = (
        f"def {a}_{b}({a}, {b}=None):\n    if {b} is None:\n        {b} = []\n    for item in {a}:\n"
        f"        if item not in {b}:\n            {b}.append(item)\n    return {b}"
    )
    tests = "\n".join(f"assert {a}_{b}([{i}, {i}]) == [{i}]" for i in rng.sample(range(100), rng.randint(1, 5)))
    code = f"```python\n{body}\n\n\n{tests}\n```"
    return f"Write a function {a}_{b}.", rng.choice(
        (code, f"{body}\n\n\n{tests}", f"Here is the function:\n\n{code}\n\nIt keeps the order of the items.")
    )


def _verse(rng: random.Random, n: int) -> tuple[str, str]:
    refrain = f"Oh {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, sing to me,\nsing of the {rng.choice(NOUNS)} and the sea."
    verses = [
        "\n".join(
            f"{rng.choice(('The', 'A', 'My', 'One'))} {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} "
            f"{rng.choice(('waits', 'sleeps', 'falls', 'burns'))} "
            f"{rng.choice(('by', 'near', 'under', 'over'))} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)},"
            for _ in range(rng.randint(3, 5))
        )
        for _ in range(rng.randint(2, 4))
    ]
    return "Write a song with a refrain.", "\n\n".join(f"{verse}\n\n{refrain}" for verse in verses)


def _formula(rng: random.Random, n: int) -> tuple[str, str]:
    a, b, c = (rng.randint(2, 99) for _ in range(3))
    work = f"We have $x = \\frac{{{a * c} - {b * c}}}{{{c}}}$. Both terms can be divided by {c}:\n$$x = {a} - {b} = {a - b}$$\n"
    return f"Solve for x, {a}, {b}, {c}.", work + rng.choice(
        (
            f"So the answer is {a - b}.",
            f"Answer: {a - b}",
            f"\\boxed{{{a - b}}}",
            f"Therefore $x = {a - b}$",
            f"The answer is {a - b}",
        )
    )


def _boxes(rng: random.Random, n: int) -> tuple[str, str]:
    def box() -> str:
        x, y = rng.randint(0, 700), rng.randint(0, 700)
        return f"[{x}, {y}, {x + rng.randint(1, 300)}, {y + rng.randint(1, 300)}]"

    name = rng.choice(NOUNS)
    return f"Where is the {name}?", rng.choice(
        ("", "Here it is: ")
    ) + f"<ref>{name}</ref><box>[{', '.join(box() for _ in range(rng.randint(1, 9)))}]</box>"


_ZH = (
    ("圆形", "三角形", "矩形"),
    ("红色", "蓝色", "绿色", "黄色", "黑色", "棕色", "灰色"),
    ("左上角", "右下角", "中央", "上方", "边缘"),
)


def _chinese(rng: random.Random, n: int) -> tuple[str, str]:
    shape, colour, place = (rng.choice(words) for words in _ZH)
    number = rng.randint(2, 40)
    return "请描述这张图片。", rng.choice(
        (
            f"图片{place}有一个{colour}的{shape}，背景颜色较浅，没有其他物体。",
            f"这是第{number}张图片，里面画着{colour}的{shape}，位于{place}。它的边缘很清晰，背景是纯色。",
            f"{colour}的{shape}",
            f"图中可以看到{number}个{shape}，它们都是{colour}的，排列在画面{place}。",
            f"使用Python画出的{shape}，颜色是{colour}，编号{number}",
        )
    )


def _json(rng: random.Random, n: int) -> tuple[str, str]:
    rows = ",\n".join(
        f'  {{"name": "{rng.choice(NOUNS)}", "size": {rng.randint(1, 99)}, "tags": ["{rng.choice(ADJECTIVES)}"]}}'
        for _ in range(rng.randint(1, 6))
    )
    return "Answer in JSON.", f"[\n{rows}\n]"


def _steps(rng: random.Random, n: int) -> tuple[str, str]:
    steps = [
        f"{rng.choice(('Take', 'Move', 'Clean', 'Open', 'Paint'))} the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        f"{rng.choice(('', ' with care', ' first'))}"
        for _ in range(rng.randint(3, 9))
    ]
    end, mark = rng.choice((".", "")), rng.choice(("- {}", "{n}. {}", "* {}", "Step {n}: {}"))
    return "What are the steps?", "\n".join(mark.format(step + end, n=i) for i, step in enumerate(steps, 1))


def _choice(rng: random.Random, n: int) -> tuple[str, str]:
    letter, noun = rng.choice("ABCD"), rng.choice(NOUNS)
    return f"Which one is the {noun}? {n}", rng.choice(
        (
            letter,
            f"{letter}. {noun}",
            f"The picture shows a {noun}, as its form tells. The answer is {letter}.",
            f"Its form is that of a {noun}.\nAnswer: {letter}",
            f"({letter})",
        )
    )


MAKERS = (_count, _table, _code, _verse, _formula, _boxes, _chinese, _json, _steps, _choice, _bare_table)
"""Each gives a question and an answer; n is a number to make questions differ."""
