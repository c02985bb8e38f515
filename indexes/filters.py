"""Metadata filters: which documents a search may look into.

`{"source": "wiki"}` asks for a value, `{"source": ["wiki", "news"]}` for one of several, `{"year": {"$gte": 1990}}`
compares (`$eq $ne $gt $gte $lt $lte $in $nin`, as the vector stores of this field spell them); all names must hold.
A document without the name fails every condition but `$ne` and `$nin`. True equals 1, as in Python.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from stripedrag.errors import UsageError
from stripedrag.indexes.checks import lone_surrogate
from stripedrag.indexes.documents import Scalar

Where: TypeAlias = Mapping[str, Scalar | Sequence[Scalar] | Mapping[str, Scalar | Sequence[Scalar]]]

# From `$eq`, `$gt`, `$gte`, `$lt` or `$lte` and a value, or `$in` and a list, the SQL that compares a row of `metadata`
# so, and its values.
Comparison: TypeAlias = Callable[[str, Any], tuple[str, list[Any]]]

MOST_NAMES = 100  # with all operators on each, SQLite's deepest expression is nearly reached
_NEGATED = {"$ne": "$eq", "$nin": "$in"}
_OPERATORS = ("$eq", "$gt", "$gte", "$lt", "$lte", "$ne", "$in", "$nin")


def sql(where: Where, comparison: Comparison) -> tuple[str, list[Any]]:
    """The condition over the table `documents`, and its values. Raises `UsageError` for what is no filter."""
    if not isinstance(where, Mapping):
        raise UsageError(f"where is {where!r}; it must map names of metadata to values. Write {{'year': 1990}}.")
    conditions, values = ["TRUE"], []
    if len(where) > MOST_NAMES:
        raise UsageError(f"where has {len(where)} names; the limit is {MOST_NAMES}. Ask for fewer.")
    for name, wanted in where.items():
        if not isinstance(name, str):
            raise UsageError(f"where has the name {name!r}; names of metadata are strings. Write {{'year': 1990}}.")
        if wanted == {}:
            raise UsageError(f"where has no condition for {name!r}. Leave the name out, or write {{'$gte': 1990}}.")
        tests = wanted if isinstance(wanted, Mapping) else {"$in" if _is_list(wanted) else "$eq": wanted}
        for operator, operand in tests.items():
            condition, used = _condition(name, operator, operand, comparison)
            conditions.append(condition)
            values += used
    return " AND ".join(conditions), values


def _condition(name: str, operator: str, operand: Any, comparison: Comparison) -> tuple[str, list[Any]]:
    if operator not in _OPERATORS:
        raise UsageError(f"where has {operator!r} for {name!r}; choose one of {', '.join(_OPERATORS)}")
    if operator in _NEGATED:
        condition, values = _condition(name, _NEGATED[operator], operand, comparison)
        return f"NOT {condition}", values
    operands = operand if operator == "$in" else [operand]
    if not _is_list(operands) or not all(isinstance(value, str | int | float | bool | None) for value in operands):
        wanted = "a list of strings and numbers" if operator == "$in" else "a string, a number, a bool or None"
        raise UsageError(f"where has {operand!r} for {name!r}; {operator} takes {wanted}. Convert it.")
    for text in (name, *(one for one in operands if isinstance(one, str))):
        if surrogate := lone_surrogate(text):
            raise UsageError(f"where has {surrogate} of {text!r}, which is no character. Decode it as UTF-8 first.")
    if infinite := next((n for n in operands if isinstance(n, float) and not math.isfinite(n)), None):
        raise UsageError(f"where has {infinite} for {name!r}; numbers in an index are finite. Leave it out.")
    compared, values = comparison(operator, operand)
    inner = f"SELECT document FROM metadata WHERE name = ? AND ({compared})"
    return f"key IN ({inner})", [name, *values]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
