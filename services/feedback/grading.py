"""How a questionnaire's answers are graded: its items and scoring, put as what `scoring.score` works by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from services.feedback.instruments import INSTRUMENTS
from services.feedback.scoring import score

_LOW_IS_BAD = ("nps", "csat")
# The item about self-harm counts as critical whoever wrote the questionnaire.
_ALWAYS_CRITICAL = {"phq-9": 9}


class Grade(NamedTuple):
    """What answers amount to; `score` is None where it can't be had."""

    score: int | None
    band: str
    bad: bool
    critical_link_ids: list[str]


def counted_items(items: Sequence[Mapping[str, Any]], scoring: Mapping[str, Any]) -> list[str]:
    """Link ids of the items that count, in the order of the instrument."""
    return list(scoring.get("link_ids") or (item["link_id"] for item in items if item["kind"] != "TEXT"))


def critical_items(items: Sequence[Mapping[str, Any]], scoring: Mapping[str, Any]) -> dict[str, int]:
    """Link ids whose answers may be critical, with the value from which they are."""
    found = {item["link_id"]: item["critical_from"] for item in items if "critical_from" in item}
    place = _ALWAYS_CRITICAL.get(scoring.get("method", ""), 0)
    counted = counted_items(items, scoring)
    if 0 < place <= len(counted):
        found[counted[place - 1]] = min(1, found.get(counted[place - 1], 1))
    return found


def flaw(items: Sequence[Mapping[str, Any]], scoring: Mapping[str, Any]) -> str:
    """Why answers could not be graded so, in one sentence; "" where they can."""
    method = scoring.get("method", "")
    options = {item["link_id"]: _values(item) for item in items if item["kind"] != "TEXT"}
    counted = counted_items(items, scoring)
    if not set(counted) <= options.keys() or len(set(counted)) != len(counted):
        return "Scoring may name each item with options once."
    if not method:
        return ""
    if not counted:
        return "Scoring needs at least one item with options."
    shipped = INSTRUMENTS.get(method, {}).get("scoring")
    if shipped is None:
        return ""
    if len(counted) != len(shipped["items"]):
        return f"{method} counts {len(shipped['items'])} items."
    if any((min(options[one]), max(options[one])) != (shipped["minimum"], shipped["maximum"]) for one in counted):
        return f"Answers of {method} go from {shipped['minimum']} to {shipped['maximum']}."
    return ""


def grade(items: Sequence[Mapping[str, Any]], scoring: Mapping[str, Any], answers: Mapping[str, int]) -> Grade:
    """Grade answers (link id to value) that were found valid."""
    found = score({"items": items, "scoring": _rules(items, scoring)}, answers)
    total = None if found.total is None else math.floor(found.total + 0.5)
    return Grade(total, found.band or "", found.bad, found.critical)


def _values(item: Mapping[str, Any]) -> list[int]:
    return [option.get("value", 0) for option in item.get("options", ())]


def _rules(items: Sequence[Mapping[str, Any]], scoring: Mapping[str, Any]) -> dict[str, Any]:
    critical = [{"link_id": link_id, "above": value - 1} for link_id, value in critical_items(items, scoring).items()]
    method = scoring.get("method", "")
    if not method:
        return {"method": "sum", "items": [], "minimum": 0, "maximum": 1, "critical": critical}
    counted = counted_items(items, scoring)
    values = [value for item in items if item["link_id"] in counted for value in _values(item)]
    shipped = INSTRUMENTS.get(method, {}).get("scoring", {})
    bad_side = "at_most" if method in _LOW_IS_BAD else "at_least"
    return {
        "method": shipped.get("method", "sum"),
        "items": counted,
        "minimum": min(values),
        "maximum": max(values),
        "prorate_missing": shipped.get("prorate_missing", 0),
        "bands": shipped.get("bands", ()),
        "bad": {bad_side: scoring["bad_at"]} if "bad_at" in scoring else {},
        "critical": critical,
    }
