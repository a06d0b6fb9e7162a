"""Who can have a visit: rules of a visit type on what is known of a patient.

What isn't known of somebody excludes nobody: a birth date of a year alone counts as any day of it, an unknown sex as
either, a payer that nobody named as accepted. Only a referral must be there where one is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

NEW_WITHIN_YEARS = 3
"""As billing rules count: who had no visit of the specialty for so long is new again (CPT, evaluation and management)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the patients service knows of somebody: a birth date (YYYY, YYYY-MM or YYYY-MM-DD), a sex, a home state."""

    birth_date: str = ""
    sex: str = ""
    state: str = ""


NOTHING = Facts()


def needs_facts(rule: Mapping[str, Any] | None) -> bool:
    """Whether a rule asks for what only patients knows."""
    return bool(rule and (rule.get("minimum_age") or "maximum_age" in rule or rule.get("sex")))


def refusals(
    rule: Mapping[str, Any] | None,
    facts: Facts,
    *,
    new_patient: bool,
    referral: bool,
    payer: str,
    day: date | None = None,
) -> list[str]:
    """Why a patient can't have it, as short codes; none where nothing speaks against it. Age only where a day is given."""
    if not rule:
        return []
    wanted = rule.get("patients")
    first, last = age_days(rule, facts.birth_date)
    against = {
        "NEW_ONLY": wanted == "NEW" and not new_patient,
        "ESTABLISHED_ONLY": wanted == "ESTABLISHED" and new_patient,
        "AGE": day is not None and not first <= day <= last,
        "SEX": bool(rule.get("sex")) and facts.sex in ("male", "female") and facts.sex != rule["sex"],
        "REFERRAL": bool(rule.get("referral_required")) and not referral,
        "PAYER": bool(rule.get("payers")) and bool(payer) and payer not in rule["payers"],
    }
    return [code for code, is_so in against.items() if is_so]


def age_days(rule: Mapping[str, Any] | None, birth_date: str) -> tuple[date, date]:
    """The first and the last day on which somebody is of the right age; all days where nothing is asked or known."""
    rule = rule or {}
    if not birth_date:
        return date.min, date.max
    year, month, day = (*(int(part) for part in birth_date.split("-")), 0, 0)[:3]
    oldest, youngest = (month or 1, day or 1), (month or 12, day or 31)
    first = last = None
    if rule.get("minimum_age"):
        first = _birthday(year + rule["minimum_age"], *oldest)
    if "maximum_age" in rule:
        last = _birthday(year + rule["maximum_age"] + 1, *youngest)
    return first or date.min, date.fromordinal(last.toordinal() - 1) if last else date.max


def _birthday(year: int, month: int, day: int) -> date | None:
    """The birthday in a year: who was born on a day that the year doesn't have comes of age the day after."""
    if not date.min.year < year < date.max.year:
        return None
    try:
        return date(year, month, day)
    except ValueError:
        return date(year, month + 1, 1) if month < 12 else date(year, 12, 31)
