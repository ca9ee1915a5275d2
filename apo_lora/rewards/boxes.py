"""Overlap of bounding boxes: intersection over union of the boxes in a completion with those in the gold answer.

A box is two corners (x1, y1), (x2, y2), the second to the right of the first and below it, in one unit for gold and
completion alike: pixels, or thousandths of the image's width and height, which end at 1000.
"""

import json
import re
from collections.abc import Iterator

from apo_lora.rewards.answers.denials import NEGATED

Box = tuple[float, float, float, float]

_MOST_CHARS = 4000  # an answer of more boxes than fit is no answer
_MOST_BOXES = 100
_NUMBER = r"-?\d{1,9}(?:\.\d{1,9})?"
# Four numbers in a row, whatever brackets they stand in: [1, 2, 3, 4], (1, 2), (3, 4), 1 2 3 4
_ROW = re.compile(rf"(?<![\w.-]){_NUMBER}(?:(?: ?\) ?,? ?\( ?| ?[,;] ?\(? ?| ){_NUMBER})*(?![\w.])")


def iou_reward(completion: str, answer: str, unit: str = "pixels") -> float:
    """Intersection over union of the completion's box with the gold `answer`'s, in 0..1. `unit`: see boxes_in.

    Of several boxes each is paired once, those with the largest overlap first; the sum is divided by the number of
    boxes in gold or completion, whichever has more, so that both a missing box and one too many cost. "Not [...]" is
    no box.
    """
    part = _final_part(completion)
    is_denied = NEGATED.search(re.sub(r'"[^"]*"', "", part))  # a label may say "no hat"
    gold, said = boxes_in(answer, unit), [] if is_denied else boxes_in(part, unit)
    overlaps = sorted(
        ((_iou(box, other), i, j) for i, box in enumerate(gold) for j, other in enumerate(said)), reverse=True
    )
    total, paired_gold, paired_said = 0.0, set(), set()
    for overlap, i, j in overlaps:
        if i not in paired_gold and j not in paired_said:
            total += overlap
            paired_gold.add(i)
            paired_said.add(j)
    return total / max(len(gold), len(said), 1)


def boxes_in(text: str, unit: str = "pixels") -> list[Box]:
    """Every box in the text. None at all where one is impossible: empty, negative, or beyond 1000 `thousandths`."""
    if len(text) > _MOST_CHARS:
        return []
    rows = (re.findall(_NUMBER, row) for row in _ROW.findall(" ".join(text.split())))
    boxes = [tuple(map(float, row)) for row in rows if len(row) == 4]
    most = 1000.0 if unit == "thousandths" else float("inf")
    possible = all(0 <= x1 < x2 <= most and 0 <= y1 < y2 <= most for x1, y1, x2, y2 in boxes)
    return boxes if possible and len(boxes) <= _MOST_BOXES else []


def _final_part(completion: str) -> str:
    """Where a model puts its boxes: the last <answer>, else the last code fence, else the last line with a box."""
    said = completion.rsplit("</think>", 1)[-1].split("<think>", 1)[0]
    if "<answer>" in said:
        return said.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0]
    said = said[-_MOST_CHARS:]
    fences = said.split("```")
    if len(fences) > 2:
        return fences[-2]
    return next((line for line in reversed(said.splitlines()) if boxes_in(line)), "")


def _iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(one) + _area(other) - shared)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def box_tries(answer: str) -> Iterator[tuple[str, float, str]]:
    """(what it is, its right reward, final answer), for the check of rewards."""
    boxes = boxes_in(answer)
    yield "unchanged", 1.0, answer
    yield "JSON", 1.0, json.dumps([{"bbox_2d": box, "label": "1"} for box in boxes])
    if len(boxes) == 1:
        x1, y1, x2, y2 = boxes[0]
        yield "corners", 1.0, f"({x1}, {y1}), ({x2}, {y2})"
    wide = max((box[2] for box in boxes), default=0.0)
    yield "a box elsewhere", 0.0, json.dumps([(x1 + wide, y1, x2 + wide, y2) for x1, y1, x2, y2 in boxes])
    yield "no box", 0.0, "nothing"
