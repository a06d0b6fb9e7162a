"""Scores of questionnaire answers; every threshold is data in the definition, none is code.

A definition's `scoring` says: `method` (sum | mean), `items` (link ids that count), `minimum` and `maximum` of one
answer, `prorate_missing` (how many may lack, default 0), `bands` (ascending `{name, from}`), `bad` (`{at_least}` or
`{at_most}`) and `critical` (`{link_id, above}` each). A definition without `scoring` has no score.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Score:
    """`total` and `band` are None when not scorable; `critical` lists the link ids that need a person the same day."""

    total: float | None
    band: str | None
    bad: bool
    critical: list[str]
    missing: int = 0


def check(definition: Mapping[str, Any]) -> None:
    """ValueError, with the reason, if `score` could not work by this definition's `scoring`."""
    rules = definition.get("scoring")
    if not rules:
        return
    known = {item["link_id"] for item in definition["items"]}
    used = {*rules["items"], *(rule["link_id"] for rule in rules.get("critical", ()))}
    starts = [band["from"] for band in rules.get("bands", ())]
    if not rules["items"] or not used <= known:
        raise ValueError("scoring must name at least one item, and only items of the questionnaire")
    if rules["method"] not in ("sum", "mean") or rules["minimum"] >= rules["maximum"]:
        raise ValueError("scoring needs the method sum or mean, and a minimum below the maximum")
    if starts != sorted(set(starts)) or not set(rules.get("bad", {})) <= {"at_least", "at_most"}:
        raise ValueError("bands must ascend, and bad may hold at_least or at_most")


def score(definition: Mapping[str, Any], answers: Mapping[str, Any]) -> Score:
    """Score answers (link id -> number, or the code of one of the item's options; absent or None is missing).

    Up to `prorate_missing` missing items are prorated (the mean of the answered ones stands in, rounded half up). A
    critical answer counts however little else was answered, and so does a bad sum that no missing answer could mend.
    ValueError names the link id, never the answer.
    """
    rules: Mapping[str, Any] | None = definition.get("scoring")
    if not rules:
        return Score(None, None, False, [])
    items = {item["link_id"]: item for item in definition["items"]}
    wanted: list[str] = list(rules["items"])
    critical_rules: list[Mapping[str, Any]] = list(rules.get("critical", ()))
    values = {
        link_id: value
        for link_id in {*wanted, *(rule["link_id"] for rule in critical_rules)}
        if (value := _value(items[link_id], answers.get(link_id))) is not None
    }
    minimum, maximum = rules["minimum"], rules["maximum"]
    answered = [values[link_id] for link_id in wanted if link_id in values]
    for link_id in wanted:
        if link_id in values and not minimum <= values[link_id] <= maximum:
            raise ValueError(f"the answer to {link_id} must be from {minimum} to {maximum}")

    missing = len(wanted) - len(answered)
    total: float | None = None
    if answered and missing <= rules.get("prorate_missing", 0):
        if rules["method"] == "mean":
            total = sum(answered) / len(answered)
        elif missing:
            total = math.floor(sum(answered) * len(wanted) / len(answered) + 0.5)
        else:
            total = sum(answered)

    critical = [rule["link_id"] for rule in critical_rules if values.get(rule["link_id"], -math.inf) > rule["above"]]
    return Score(total, _band(rules, total), _is_bad(rules, total, answered, missing), critical, missing)


def _value(item: Mapping[str, Any], answer: Any) -> float | None:
    if isinstance(answer, str):
        scores = [option["score"] for option in item.get("options", ()) if option["code"] == answer]
        if not scores:
            raise ValueError(f"the answer to {item['link_id']} is none of its options")
        return float(scores[0]) if isinstance(scores[0], float) else int(scores[0])
    if answer is None:
        return None
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        raise ValueError(f"the answer to {item['link_id']} must be a number or one of its options")
    return int(answer) if answer == int(answer) else answer


def _band(rules: Mapping[str, Any], total: float | None) -> str | None:
    if total is None:
        return None
    reached = [str(band["name"]) for band in rules.get("bands", ()) if total >= band["from"]]
    return reached[-1] if reached else None


def _is_bad(rules: Mapping[str, Any], total: float | None, answered: list[float], missing: int) -> bool:
    bad: Mapping[str, float] = rules.get("bad", {})
    least, most = bad.get("at_least", math.inf), bad.get("at_most", -math.inf)
    if total is not None:
        return total >= least or total <= most
    return bool(rules["method"] == "sum" and sum(answered) + missing * rules["minimum"] >= least)


def net_promoter_score(ratings: Iterable[float]) -> float | None:
    """Percentage of 9 and 10 minus percentage of 0 to 6, -100 to 100; None without ratings."""
    given = list(ratings)
    if not given:
        return None
    return 100 * (sum(rating >= 9 for rating in given) - sum(rating <= 6 for rating in given)) / len(given)


def top_box(ratings: Iterable[float], at_least: float = 4) -> float | None:
    """Percentage of ratings that reach `at_least` (CSAT: 4 of 5; CAHPS rating: 9 of 10); None without ratings."""
    given = list(ratings)
    return 100 * sum(rating >= at_least for rating in given) / len(given) if given else None
