"""The zone and line type that an address or a phone number tells, and None where they leave a choice."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import phonenumbers
import tzfpy

_EASTERN, _CENTRAL = "America/New_York", "America/Chicago"
_MOUNTAIN, _PACIFIC = "America/Denver", "America/Los_Angeles"

# States with one zone have it here. One with several has None: whoever guessed would text somebody at night.
_STATES: dict[str, tuple[str, str | None]] = {
    "AK": ("alaska", None),
    "AL": ("alabama", _CENTRAL),
    "AR": ("arkansas", _CENTRAL),
    "AZ": ("arizona", None),
    "CA": ("california", _PACIFIC),
    "CO": ("colorado", _MOUNTAIN),
    "CT": ("connecticut", _EASTERN),
    "DC": ("district of columbia", _EASTERN),
    "DE": ("delaware", _EASTERN),
    "FL": ("florida", None),
    "GA": ("georgia", _EASTERN),
    "GU": ("guam", "Pacific/Guam"),
    "HI": ("hawaii", "Pacific/Honolulu"),
    "IA": ("iowa", _CENTRAL),
    "ID": ("idaho", None),
    "IL": ("illinois", _CENTRAL),
    "IN": ("indiana", None),
    "KS": ("kansas", None),
    "KY": ("kentucky", None),
    "LA": ("louisiana", _CENTRAL),
    "MA": ("massachusetts", _EASTERN),
    "MD": ("maryland", _EASTERN),
    "ME": ("maine", _EASTERN),
    "MI": ("michigan", None),
    "MN": ("minnesota", _CENTRAL),
    "MO": ("missouri", _CENTRAL),
    "MS": ("mississippi", _CENTRAL),
    "MT": ("montana", _MOUNTAIN),
    "NC": ("north carolina", _EASTERN),
    "ND": ("north dakota", None),
    "NE": ("nebraska", None),
    "NH": ("new hampshire", _EASTERN),
    "NJ": ("new jersey", _EASTERN),
    "NM": ("new mexico", _MOUNTAIN),
    "NV": ("nevada", None),
    "NY": ("new york", _EASTERN),
    "OH": ("ohio", _EASTERN),
    "OK": ("oklahoma", _CENTRAL),
    "OR": ("oregon", None),
    "PA": ("pennsylvania", _EASTERN),
    "PR": ("puerto rico", "America/Puerto_Rico"),
    "RI": ("rhode island", _EASTERN),
    "SC": ("south carolina", _EASTERN),
    "SD": ("south dakota", None),
    "TN": ("tennessee", None),
    "TX": ("texas", None),
    "UT": ("utah", _MOUNTAIN),
    "VA": ("virginia", _EASTERN),
    "VI": ("virgin islands", "America/St_Thomas"),
    "VT": ("vermont", _EASTERN),
    "WA": ("washington", _PACIFIC),
    "WI": ("wisconsin", _CENTRAL),
    "WV": ("west virginia", _EASTERN),
    "WY": ("wyoming", _MOUNTAIN),
}
_BY_NAME = {name: code for code, (name, _) in _STATES.items()}

# First three digits of a ZIP code, from and to, and the state. Military mail (090-098, 340, 962-966) tells no place.
_ZIP = """006-007 PR 008-008 VI 009-009 PR 010-027 MA 028-029 RI 030-038 NH 039-049 ME 050-059 VT 060-069 CT 070-089 NJ
100-149 NY 150-196 PA 197-199 DE 200-200 DC 201-201 VA 202-205 DC 206-219 MD 220-246 VA 247-268 WV 270-289 NC 290-299 SC
300-319 GA 320-339 FL 341-349 FL 350-369 AL 370-385 TN 386-397 MS 398-399 GA 400-427 KY 430-459 OH 460-479 IN 480-499 MI
500-528 IA 530-549 WI 550-567 MN 570-577 SD 580-588 ND 590-599 MT 600-629 IL 630-658 MO 660-679 KS 680-693 NE 700-714 LA
716-729 AR 730-749 OK 750-799 TX 800-816 CO 820-831 WY 832-838 ID 840-847 UT 850-865 AZ 870-884 NM 885-885 TX 889-898 NV
900-961 CA 967-968 HI 969-969 GU 970-979 OR 980-994 WA 995-999 AK""".split()
_ZIP_RANGES = [(int(span[:3]), int(span[4:]), state) for span, state in zip(_ZIP[::2], _ZIP[1::2], strict=True)]


def zone_at(latitude: float, longitude: float) -> str | None:
    """The IANA zone of a point in degrees; None at sea."""
    zone: str = tzfpy.get_tz(longitude, latitude)
    return zone if zone and not zone.startswith("Etc/") else None


def us_state(address: Mapping[str, Any]) -> str | None:
    """The two letters of the state of an address (proto3 JSON of `care.type.v1.Address`), spelled out or not."""
    if str(address.get("country", "US")).strip().casefold() not in ("us", "usa", "united states", ""):
        return None
    state = str(address.get("state", "")).strip()
    if state.upper() in _STATES:
        return state.upper()
    if code := _BY_NAME.get(state.casefold()):
        return code
    prefix = str(address.get("postalCode", ""))[:3]
    if len(prefix) == 3 and prefix.isascii() and prefix.isdigit():
        return next((state for first, last, state in _ZIP_RANGES if first <= int(prefix) <= last), None)
    return None


def zone_of(address: Mapping[str, Any]) -> tuple[str, str] | None:
    """Zone and its source (`COORDINATES` or `POSTAL_CODE`, as in `Patient.TimeZoneSource`) of an address; None if unclear."""
    if (
        "latitude" in address
        and "longitude" in address
        and (zone := zone_at(address["latitude"], address["longitude"]))
    ):
        return zone, "COORDINATES"
    state = us_state(address)
    if state and (only := _STATES[state][1]):
        return only, "POSTAL_CODE"
    return None


@lru_cache(maxsize=4096)
def phone_line(value: str, region: str) -> tuple[str | None, str]:
    """E.164 (None if the number can't exist) and line type of a phone number as written in `region`."""
    try:
        number = phonenumbers.parse(value, region)
    except phonenumbers.NumberParseException:
        return None, "INVALID"
    if not phonenumbers.is_valid_number(number):
        return None, "INVALID"
    kinds = {
        phonenumbers.PhoneNumberType.MOBILE: "MOBILE",
        phonenumbers.PhoneNumberType.FIXED_LINE: "LANDLINE",
    }
    return (
        phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164),
        kinds.get(phonenumbers.number_type(number), "UNKNOWN"),
    )
