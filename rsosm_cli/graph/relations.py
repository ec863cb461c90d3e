"""From DE-9IM matrices to the relations of the heterograph (``docs/methods.md``).

A matrix is nine characters in the order of the standard: interior, boundary and exterior of the first object against
those of the second, row by row; ``F`` where they do not meet, else the dimension of what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rsosm_cli.graph.schema import NODE_TYPES, RELATIONS

Rules = Literal["partition", "released"]
Matrix = NDArray[np.uint8]  # (n, 9) characters

# Relations of a pair whatever its types; `NONE` makes no edge. RELATIONS names the columns that a pair has.
NAMES: tuple[str, ...] = (
    "none", "touch", "equal", "cover", "cover-by", "cross", "overlap", "within", "contain", "self", "delaunay",
)  # fmt: skip
NONE, TOUCH, EQUAL, COVER, COVER_BY, CROSS, OVERLAP, WITHIN, CONTAIN, SELF, DELAUNAY = range(len(NAMES))
_CONVERSE = np.arange(len(NAMES), dtype=np.uint8)
_CONVERSE[[COVER, COVER_BY, WITHIN, CONTAIN]] = [COVER_BY, COVER, CONTAIN, WITHIN]

NO_COLUMN = 255

# First that holds, as published; `T` means "not F". For two objects of one type the released code relates (j, i), i <
# j.
_TOUCH = ("FT*******", "F**T*****", "F***T****")
_COVER = ("T*****FF*", "*T****FF*", "***T**FF*", "****T*FF*")
_COVER_BY = ("T*F**F***", "*TF**F***", "**FT*F***", "**F*TF***")
_DISJOINT = ("FF*FF****",)

_Rule = tuple[tuple[str, ...], int]
_PARTITION_AREAL: tuple[_Rule, ...] = (
    (_DISJOINT, NONE),
    (("F********",), TOUCH),
    (("T*F**FFF*",), EQUAL),
    (("T*****FF*",), COVER),
    (("T*F**F***",), COVER_BY),
)
_RULES: dict[tuple[Rules, str, str], tuple[tuple[_Rule, ...], int]] = {
    # (rules, type of the first, type of the second): patterns with their relation, and what is left over.
    ("partition", "polygon", "polygon"): (_PARTITION_AREAL, OVERLAP),
    ("partition", "line", "line"): ((*_PARTITION_AREAL, (("0********",), CROSS)), OVERLAP),
    ("partition", "line", "polygon"): ((_PARTITION_AREAL[0], _PARTITION_AREAL[1], _PARTITION_AREAL[4]), CROSS),
    ("partition", "point", "line"): (_PARTITION_AREAL[:2], WITHIN),
    ("partition", "point", "polygon"): (_PARTITION_AREAL[:2], WITHIN),
    # Read for (j, i): where j covers i, the pair (i, j) is cover-by.
    ("released", "polygon", "polygon"): (
        ((_DISJOINT, NONE), (_TOUCH, TOUCH), (_COVER, COVER_BY), (_COVER_BY, COVER), (("T*T***T**",), OVERLAP)),
        NONE,
    ),
    ("released", "line", "polygon"): (
        ((_DISJOINT, NONE), (_TOUCH, TOUCH), (_COVER_BY, COVER_BY), (("T*T******", "T*****T**"), CROSS)),
        NONE,
    ),
    ("released", "point", "line"): (((_DISJOINT, NONE), (_TOUCH, TOUCH), (("T*F**F***",), WITHIN)), NONE),
}
_RULES["released", "line", "line"] = _RULES["released", "polygon", "polygon"]
_RULES["released", "point", "polygon"] = _RULES["released", "point", "line"]

_TRANSPOSED = [0, 3, 6, 1, 4, 7, 2, 5, 8]


def _form(text: str) -> Matrix:
    return np.frombuffer(text.encode(), np.uint8)


# A point, a line and a polygon inside a larger polygon, off its boundary; two equal polygons.
WITHIN_FORMS: Matrix = np.stack([_form("0FFFFF212"), _form("1FF0FF212"), _form("2FF1FF212")])
EQUAL_FORM: Matrix = _form("2FFF1FFF2")


def transposed(matrix: Matrix) -> Matrix:
    """Return the matrices (n, 9) of second against first."""
    return matrix[:, _TRANSPOSED]


def matrices(texts: Sequence[str]) -> Matrix:
    """Return (n, 9) characters of ``n`` DE-9IM strings."""
    return np.asarray(texts, dtype="S9").view(np.uint8).reshape(-1, 9)


def classify(source: str, target: str, matrix: Matrix, rules: Rules) -> NDArray[np.uint8]:
    """Return (n,) the relation (index into :data:`NAMES`) of source to target, from their matrices.

    ``source`` precedes ``target`` in :data:`NODE_TYPES`, or is the same; objects of one type come in node order.
    """
    patterns, rest = _RULES[rules, source, target]
    read = transposed(matrix) if rules == "released" and source == target else matrix
    # From the last rule to the first, so that the first that holds is written last.
    found = np.full(len(matrix), rest, np.uint8)
    for masks, relation in reversed(patterns):
        found[_any_pattern(read, masks)] = relation
    return found


def converse(relation: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the relation of target to source from that of source to target."""
    return _CONVERSE[relation]


def columns(source: str, target: str, relation: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the one-hot column of each relation for a pair of types."""
    table = np.full(len(NAMES), NO_COLUMN, np.uint8)
    for column, name in enumerate(RELATIONS[source, target]):
        table[NAMES.index(name)] = column
    return table[relation]


def _any_pattern(matrix: Matrix, masks: tuple[str, ...]) -> NDArray[np.bool_]:
    held = np.zeros(len(matrix), bool)
    for mask in masks:
        one = np.ones(len(matrix), bool)
        for place, wanted in enumerate(mask):
            if wanted == "T":
                one &= matrix[:, place] != ord("F")
            elif wanted != "*":
                one &= matrix[:, place] == ord(wanted)
        held |= one
    return held


def relation_table(rules: Rules = "partition") -> str:
    """Return the rules, first that holds, as a Markdown table made from the patterns that :func:`classify` reads."""
    lines = ["| pair | first pattern that holds | relation | converse |", "|---|---|---|---|"]
    pairs = [(a, b) for i, a in enumerate(NODE_TYPES) for b in NODE_TYPES[i:] if (rules, a, b) in _RULES]
    for a, b in pairs:
        patterns, rest = _RULES[rules, a, b]
        read = f"{a}-{b}" + (" (second against first)" if rules == "released" and a == b else "")
        for masks, relation in (*patterns, ((), rest)):
            condition = ", ".join(f"`{mask}`" for mask in masks) or "anything else"
            name, back = (_title(r) for r in (relation, int(_CONVERSE[relation])))
            lines.append(f"| {read} | {condition} | {name} | {back} |")
    return "\n".join(lines) + "\n"


def _title(relation: int) -> str:
    return "no edge" if relation == NONE else NAMES[relation]
