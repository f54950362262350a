"""Spells answers in one way, so that they can be compared."""

from __future__ import annotations

import re
import unicodedata

from ivl.utils.unicode import normal_form

_CARDINALS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen"
)
CARDINALS = tuple(_CARDINALS.split())
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_SAME = {"&": "and", "grey": "gray", "colour": "color", "centre": "center", "none": "0", "cannot": "can not"}
_SAME |= {"can't": "can not", "won't": "will not"}
_SAME |= {word: str(n) for n, word in enumerate(CARDINALS)}
_SAME |= {word: str(n) + {1: "st", 2: "nd", 3: "rd"}.get(n, "th") for n, word in enumerate(ORDINALS, 1)}
ARTICLES = ("a", "an", "the")

CJK = "\u2e80-\u9fff\uf900-\ufaff"
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁄": "/", "’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "、": ",",
    "。": ".", "；": ";", "「": '"', "」": '"', "【": "[", "】": "]", "˚": "°", "º": "°",
    "\u200b": None, "\u200c": None, "\u200d": None, "\ufeff": None, "\u2060": None,
})  # fmt: skip
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|mathrm|mathbf|mathsf|mathit|operatorname|mbox|boxed|fbox)\s*\{([^{}]*)\}"
)
_SPACES = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~(?=\\)")
_DEGREES = re.compile(r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![a-zA-Z])|\\degree(?![a-zA-Z])")
_LEADS = re.compile(
    r"i (?:choose|pick|select) "
    r"|(?:(?:so|thus|therefore|hence)?,? ?)(?:the |my )?(?:(?:final|correct|right|best) )?(?:answer|option|choice)"
    r"(?:(?: is| ?[:=])+ *| (?=[(\[]?[A-H]\W*$))"
    r"|it(?: i|')s (?=[^n])|there (?:is|are) (?=[^n])|(?:所以|因此)?,?(?:正确|最终)?(?:答案(?:是|为|:)*|选项(?:是|为|:)+) *",
    re.IGNORECASE,
)


def plain(text: str) -> str:
    """Normalize characters: full-width and typographic ones to ASCII, raised digits to ^n, white space to single spaces.

    Text comes out of LaTeX's and Markdown's wrappers. Case and formulas stay.
    """
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: "^" + match[0].translate(_RAISED), text)
    text = re.sub("[¼½¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = normal_form("NFKC", text).translate(_SIGNS)
    if "\\" in text or "$" in text or "{,}" in text:
        text = _without_latex(text)
    text = re.sub(r"\*\*|__|`", "", text)
    return " ".join(text.split())


def _without_latex(text: str) -> str:
    text = text.strip().rstrip(".")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            text = text[len(opening) : len(text) - len(closing)]
    text = text.replace("{,}", ",").replace("\\!", "")
    text = _DEGREES.sub("°", text)
    for _ in range(3):
        text = _WRAPPED.sub(r" \1 ", text)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\\([%$#&{}])", r"\1", _SPACES.sub(" ", text))
    text = re.sub(r" +\^", "^", text).strip()
    return text[7:-1] if text.startswith("\\boxed{") and text.endswith("}") else text


def introduced(text: str) -> str:
    """Return the text behind an introduction such as `The answer is`."""
    return text[match.end() :] if (match := _LEADS.match(text)) and match.end() < len(text) else text


def bare(text: str) -> str:
    """Return the plain text without an introduction ("The answer is") and a closing full stop."""
    text = re.sub(r"(?<=[^\W\d_]{2})[!?]+\.?$", "", introduced(plain(text)))  # n! is a factorial
    return text.rstrip(".,; ") or text


def wording(text: str) -> str:
    """Normalize words: lower case, digits for number words, no articles, no punctuation around words.

    Signs within and before numbers stay.

    Stricter than the form of VQAv2's metric, in which -5 is 5, O- is O+ and 1/2 is 1 2.
    """
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", bare(text).lower())
    text = re.sub(r"(?<=[a-z])\.", "", text)
    text = re.sub(r"(?<=\d)[,'](?=\d{3}(?!\d))", "", text) if re.fullmatch(r"\D*\d{1,3}([,']\d{3})+(\D.*)?", text) else text
    text = re.sub(r" ?([:/]) ?", r"\1", text)
    text = re.sub(r"(?<=\d) ?(?:-|~|to|至|到) ?(?=\d)", "-", text)
    words = [stripped for word in text.split() if (stripped := _stripped(word))]
    words = [re.sub(r"n't$", " not", _SAME.get(word, word)) for word in words if word not in ARTICLES]
    text = re.sub(rf"(?<=[{CJK}]) | (?=[{CJK}])", "", " ".join(words))
    return {"是的": "是", "不是": "否", "正确": "对"}.get(text, text)


def _stripped(word: str) -> str:
    word = word.strip(",;:\"'").rstrip(".")
    return word if re.search(r"\d", word) else word.strip("()[]")


def without_left_side(text: str) -> tuple[str, str]:
    """Split off a short left side such as `x`, `AB` or `\\angle ABC`; it is empty if there is none."""
    match = re.match(r"((?:\\[a-zA-Z]+ ?|∠ ?)?[A-Za-z]{0,4}(?:_\w|\([a-z]\))?) ?[=≈] ?(?=[^=])", text)
    return (match[1].strip(), text[match.end() :]) if match and match[1] else ("", text)
