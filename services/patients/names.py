"""How names, phones and e-mail addresses are compared: columns written by code, since the database has no extensions."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import phonenumbers

_SOUNDEX = {
    letter: digit for digit, letters in enumerate(("bfpv", "cgjkqsxz", "dt", "l", "mn", "r"), 1) for letter in letters
}


def fold(name: str) -> str:
    """Lower case, without accents, marks and spaces: `Núñez-Ó Brien` is `nunezobrien`."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(char for char in decomposed if char.isalnum())


def phonetic(name: str) -> str:
    """Soundex of the folded name, "" where it has no Latin letters."""
    letters = re.sub("[^a-z]", "", fold(name))
    if not letters:
        return ""
    code, last = letters[0].upper(), _SOUNDEX.get(letters[0])
    for letter in letters[1:]:
        digit = _SOUNDEX.get(letter)
        if digit and digit != last:
            code += str(digit)
        if letter not in "hw":
            last = digit
    return code[:4].ljust(4, "0")


def digits(phone: str) -> str:
    """The last ten digits."""
    return re.sub(r"\D", "", phone)[-10:]


def normalized(points: Iterable[Mapping[str, Any]], region: str = "US") -> list[dict[str, Any]]:
    """Contact points with `e164` and line type where they can be had. Never refuses: the raw value stays."""
    return [_normalized(dict(point), region) for point in points]


def _normalized(point: dict[str, Any], region: str) -> dict[str, Any]:
    point.pop("e164", None)
    if point.get("system") not in ("PHONE", "SMS", "FAX"):
        return point
    try:
        number = phonenumbers.parse(point["value"], region)
    except phonenumbers.NumberParseException:
        point["line_type"] = "INVALID"
        return point
    if not phonenumbers.is_valid_number(number):
        point["line_type"] = "INVALID"
        return point
    point["e164"] = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    if point.get("line_type") in (None, "CODE_UNSPECIFIED", "INVALID"):
        # In North America a number doesn't show what is behind it: UNKNOWN, unless it was given as a mobile.
        mobile = phonenumbers.number_type(number) == phonenumbers.PhoneNumberType.MOBILE or point.get("use") == "MOBILE"
        point["line_type"] = "MOBILE" if mobile else "UNKNOWN"
    return point


def contact_values(points: Sequence[Mapping[str, Any]]) -> set[str]:
    """What consents are given for: E.164 numbers and lower-case addresses."""
    return {contact_key(point.get("e164") or point["value"]) for point in points if point.get("value")}


def contact_key(value: str, region: str = "US") -> str:
    """The form in which a contact value is compared and kept in consents."""
    if "@" in value:
        return value.strip().lower()
    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return value.strip()
    if not phonenumbers.is_valid_number(number):
        return value.strip()
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
