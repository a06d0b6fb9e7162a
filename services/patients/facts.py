"""What rules of eligibility are about, as a patient's row has it."""

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = """
Alabama AL;Alaska AK;Arizona AZ;Arkansas AR;California CA;Colorado CO;Connecticut CT;Delaware DE;District of Columbia DC;
Florida FL;Georgia GA;Hawaii HI;Idaho ID;Illinois IL;Indiana IN;Iowa IA;Kansas KS;Kentucky KY;Louisiana LA;Maine ME;
Maryland MD;Massachusetts MA;Michigan MI;Minnesota MN;Mississippi MS;Missouri MO;Montana MT;Nebraska NE;Nevada NV;
New Hampshire NH;New Jersey NJ;New Mexico NM;New York NY;North Carolina NC;North Dakota ND;Ohio OH;Oklahoma OK;Oregon OR;
Pennsylvania PA;Rhode Island RI;South Carolina SC;South Dakota SD;Tennessee TN;Texas TX;Utah UT;Vermont VT;Virginia VA;
Washington WA;West Virginia WV;Wisconsin WI;Wyoming WY;Puerto Rico PR;Guam GU;American Samoa AS;U.S. Virgin Islands VI
"""
_STATES = {name.strip()[:-3].lower(): name.strip()[-2:] for name in _NAMES.split(";")}
_CODES = frozenset(_STATES.values())
_PLACES = ("HOME", "TEMP", "USE_UNSPECIFIED", None)
_SEXES = {"MALE": "male", "FEMALE": "female", "OTHER": "other", "UNKNOWN": "unknown"}


def facts(gender: str, birth_date: str, addresses: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Fields of the answer; what isn't known is empty."""
    return {"birth_date": birth_date, "sex": _SEXES.get(gender, ""), "state": home_state(addresses)}


def home_state(addresses: Sequence[Mapping[str, Any]]) -> str:
    """Two letters of the state in which somebody lives; sources write it out ("Massachusetts") or not ("MA")."""
    homes = [one for one in addresses if one.get("use") in _PLACES and one.get("state")]
    homes.sort(key=lambda one: _PLACES.index(one.get("use")))
    for home in homes:
        written = " ".join(home["state"].split())
        if written.upper() in _CODES:
            return written.upper()
        if written.lower() in _STATES:
            return _STATES[written.lower()]
    return ""
