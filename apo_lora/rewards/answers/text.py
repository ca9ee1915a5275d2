"""From a model's whole completion to the short text of its final answer.

Nothing here judges an answer, and nothing is slow on a megabyte of rubbish.
"""

import json
import re
from dataclasses import dataclass

from apo_lora.rewards.answers.denials import NEGATED, takes_back
from apo_lora.rewards.answers.plain import unify_signs

MAX_ANSWER_CHARS = 1000  # a longer "answer" is an essay or an attack: it earns 0
_TAIL_CHARS = 2000  # without a tag or a box, only the end of a completion is read
_BOX_SCAN_CHARS = 2 * MAX_ANSWER_CHARS
_MAX_JOINED_BOXES = 50  # a megabyte of boxes side by side would take half a minute


@dataclass(frozen=True)
class FinalAnswer:
    """`text` of the answer; `sentence` is True where it was cut from prose rather than from a tag or a box.

    `opening` is the first sentence of prose that never says "the answer is": a "No, ..." may stand there.
    """

    text: str
    sentence: bool
    opening: str = ""


_THINKS, _THOUGHT = (re.compile(rf"<{slash}think(?:ing)?>", re.IGNORECASE) for slash in ("", "/"))
_STRUCK = re.compile(r"~~[^~]{1,200}~~")  # taken back in Markdown
_END_TOKENS = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end)\|>|</s>|<eos>|<end_of_turn>")
# "the answer is", "correct option:", "####" (GSM8K), and the same in other languages; the last one in the text counts.
_NOUNS = (
    r"\b(?:answer|ans|option|choice|solution|result|réponse|résultat|respuesta|resultado|resposta|risposta|risultato|"
    r"antwort|lösung|ergebnis|antwoord|ответ|odpowiedź|cevap|đáp án|jawaban(?:nya)?)\b|"
    r"答案|正确选项|答え|解答|正解|정답|답|الجواب|الإجابة|उत्तर"
)
_COPULAS = (
    r"\b(?:is|are|must\s+be|should\s+be|would\s+be|est|es|é|è|ist|lautet|равен|là|adalah)\b|是|为|は|[은는이가]|هو|هي|है"
)
_ANSWER_PHRASE = re.compile(
    rf"(?:(?:{_NOUNS})(?:\s+(?:to|of|for)\b[^.\n:]{{0,60}}?|\s+(?:correcte?|correct?ta|corretta|correta|finale?))?"
    rf"\s*(?:{_COPULAS}|[:=])|选项[是为]|[故应]选(?!项)|选(?=\s*\(?[A-Z])|答\s*:|####"
    r"|(?:^|\n)\s*(?:final\s+)?answer(?=\s))(?:\s*therefore\b|\s*thus\b)?\s*[:,]?\s*",
    re.IGNORECASE,
)
_PLEASANTRY = re.compile(r"\bI hope (?:it|this|that) (?:is|helps)\b.*", re.IGNORECASE | re.DOTALL)
# Not after "Dr." or a label ("C. Smith"), and not inside a number.
_ABBREVIATIONS = "".join(
    rf"(?<!\b{short}\.)" for short in ("Dr", "St", "Mr", "Mrs", "Ms", "Mt", "Prof", "No", "Fig", "Ft", "Jr", "Sr")
)
_SENTENCE_END = re.compile(
    r"(?<=[^\d\s])[.!?](?<!^[A-Z]\.)" + _ABBREVIATIONS + r"(?=\s+[A-Z$\\(])|(?<=\d)[.!?](?=\s+[A-Z][a-z])|。|\n"
)
_LABELLED_LINE = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Za-z])[.):])\s*\S")
_BARE_LINE = re.compile(r"\s*(?:[-*•]\s+)?\w[\w.,%/-]{0,11}\s*")


def final_answer(completion: str) -> FinalAnswer | None:
    """The final answer: last <answer>, else last \\boxed{}, else "answer is ...", else the last line.

    What stands before the last </think>, or after a <think> that never closes, is reasoning and is never read. But a
    model that forgets the closing tag alone, and ends with a whole <answer>...</answer>, has answered.
    None where there is no answer, or where it is longer than MAX_ANSWER_CHARS.
    """
    said = _THOUGHT.split(completion)[-1]
    if not _END_TOKENS.sub("", said[-_TAIL_CHARS:]).rstrip().endswith("</answer>"):
        said = _THINKS.split(said, maxsplit=1)[0]
    start = said.rfind("<answer>")
    if start >= 0:
        # A missing closing tag means that generation ended there: the format reward, not this one, minds.
        inside = said[start + len("<answer>") :].split("</answer>", 1)[0]
        if len(inside) > MAX_ANSWER_CHARS:
            return None
        return _wrap(last_box(inside) or _from_json(_END_TOKENS.split(inside, maxsplit=1)[0]), sentence=False)
    if "\\boxed" in said or "\\fbox" in said:
        return _wrap(last_box(said), sentence=False)
    return _from_prose(said[-_TAIL_CHARS:])


def _wrap(text: str | None, sentence: bool, opening: str = "") -> FinalAnswer | None:
    if text is None or len(text) > MAX_ANSWER_CHARS:
        return None
    text = _STRUCK.sub("", text).strip()
    return FinalAnswer(text, sentence, opening) if text else None


def _from_json(text: str) -> str:
    """The value in {"answer": 12}, or `text` itself."""
    fenced = re.fullmatch(r"\s*```\w*\s*(.*?)\s*```\s*", text, re.DOTALL)
    text = fenced.group(1) if fenced else text.strip()
    if not text.startswith("{"):
        return text
    try:
        found = json.loads(text if '"' in text else text.replace("'", '"'))
    except (ValueError, RecursionError):
        return text
    if not isinstance(found, dict) or not found:
        return text
    found = {key: value for key, value in found.items() if not NEGATED.search(key.replace("_", " "))}
    named = [value for key, value in found.items() if "answer" in key.lower()] or list(found.values())
    value = named[0] if len(named) == 1 else None
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | int | float) for part in parts):
        return text
    return ", ".join(str(part) for part in parts)


def _from_prose(tail: str) -> FinalAnswer | None:
    tail = _END_TOKENS.split(tail, maxsplit=1)[0]
    tail = _PLEASANTRY.sub("", unify_signs(tail).replace("**", "").replace("__", ""))
    lines = [line for line in tail.splitlines() if line.strip()]
    if not lines:
        return None
    phrase = after_answer_phrase("\n".join(lines))
    if phrase:
        return _wrap(phrase, sentence=True)
    labels = [_LABELLED_LINE.match(line) for line in lines[-2:]]
    if len(labels) == 2 and all(labels) and labels[0].groups() != labels[1].groups():
        return None  # the options said again
    if all(_BARE_LINE.fullmatch(line) for line in lines[-2:]) and len(lines) > 1:
        return _wrap(", ".join(lines[-2:]), sentence=True)  # a list, of which the last is not the answer
    opening, last = _sentences(lines[0])[:1], _sentences(lines[-1])[-1:]
    return _wrap("".join(last), sentence=True, opening="".join(opening))


def _sentences(line: str) -> list[str]:
    return [piece for piece in _SENTENCE_END.split(line) if piece and piece.strip()]


def after_answer_phrase(text: str) -> str | None:
    """What follows the last "answer is" (or the like), up to its full stop; None if there is none or it is denied."""
    found = list(_ANSWER_PHRASE.finditer(text))
    if not found or takes_back(_SENTENCE_END.split(text[: found[-1].start()])[-1] or ""):
        return None
    rest = text[found[-1].end() :].lstrip()
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None


def without_phrase(text: str) -> str:
    """What follows an "answer is" (or the like) near the start, over several lines; `text` itself without one."""
    text = unify_signs(text)
    found = _ANSWER_PHRASE.search(text, 0, 60)
    return text[found.end() :] if found else text


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{}; boxes that stand side by side are joined as they were joined there.

    "\\boxed{1} and \\boxed{2}" is one answer of two parts, and "\\boxed{A} or \\boxed{B}" is a hedge that must be
    seen as one; hence the joining. A box that never closes was cut off and is not an answer.
    """
    found = _one_box(text, len(text))
    if found is None:
        return None
    start, _, content = found
    for _ in range(_MAX_JOINED_BOXES):
        before = _one_box(text, start)
        if before is None:
            return content.strip()
        between = text[before[1] : start]
        joint = re.sub(r"\\(?:text|quad|qquad|ldots|textbf)\b|[\s$\\{}()\[\]~;]", "", between).lower()
        if len(between) > 40 or joint not in ("", ",", "and", "or", ",and", ",or", "/", "或", "和"):
            return content.strip()
        if before[2].strip() != content.strip():
            word = " or " if "or" in joint or joint in ("/", "或") else ", "
            content = before[2].strip() + word + content.strip()
        start = before[0]
        if len(content) > MAX_ANSWER_CHARS:
            break
    return content


def _one_box(text: str, end: int) -> tuple[int, int, str] | None:
    """(start, end, content) of the last box that opens before `end`."""
    start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
    if start < 0:
        return None
    opening = re.compile(r"\\(?:boxed|fbox)\s*").match(text, start).end()
    if text[opening : opening + 1] != "{":
        bare = re.compile(r"[^\s$\\.,]+").match(text, opening)  # \boxed 5
        return (start, bare.end(), bare.group()) if bare else None
    depth = 0
    for position in range(opening, min(len(text), opening + _BOX_SCAN_CHARS)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return start, position + 1, text[opening + 1 : position]
    return None
