"""Texts of messages: templates per purpose, channel and language, rendered in the clinic's zone, discreet where labelled."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from babel.dates import format_date, format_skeleton, format_time
from jinja2 import FileSystemLoader, StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.notifications.projections import Clinic, VisitType

FALLBACK = "en"
FOLDER = Path(__file__).parent / "templates"
# Formats of the United States, where the clinics are.
_LOCALES = {"en": "en_US", "es": "es_US"}
_NAMELESS = {"en": "Your clinic", "es": "Su clínica"}
_FILE = re.compile(r"(?P<kind>[a-z-]+)\.(?P<channel>sms|email)\.(?P<version>\d+)\.txt")


class Rendered(NamedTuple):
    """A text ready to leave. `template` names kind, channel, language and version; `wished` is what there was no text in."""

    template: str
    language: str
    wished: str
    subject: str
    text: str


class Templates:
    """All templates of the folder, parsed once. Of several versions the newest is used."""

    def __init__(self, folder: Path = FOLDER) -> None:
        # Not HTML: nothing is escaped, and a template can reach nothing but its values.
        sandbox = ImmutableSandboxedEnvironment(
            loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            autoescape=False,
        )  # fmt: skip
        self._found: dict[tuple[str, str, str], tuple[int, Template]] = {}
        for file in sorted(folder.glob("*/*.txt")):
            name = _FILE.fullmatch(file.name)
            if name is None:
                raise ValueError(f"{file.name} is no template's name")
            key, version = (name["kind"], name["channel"], file.parent.name), int(name["version"])
            if version > self._found.get(key, (0, None))[0]:
                self._found[key] = version, sandbox.get_template(f"{file.parent.name}/{file.name}")

    def languages(self, kind: str, channel: str) -> frozenset[str]:
        """Languages that there is a text in."""
        return frozenset(key[2] for key in self._found if key[:2] == (kind, channel))

    def render(self, kind: str, channel: str, languages: Sequence[str], values: Mapping[str, Any]) -> Rendered:
        """The text in the first language that there is one in, else in English. `values` come from `facts`.

        KeyError where there is no such template.
        """
        channel = channel.lower()
        language = lookup(languages, self.languages(kind, channel))
        chosen = language or FALLBACK
        version, template = self._found[kind, channel, chosen]
        text = _plain(template.render(values))
        subject = ""
        if channel == "email":
            head, _, text = text.partition("\n")
            subject = head.removeprefix("Subject:").strip()
        wished = "" if not languages or _ranges(languages[0]) & {chosen} else languages[0]
        return Rendered(f"{kind}/{channel}/{chosen}/{version}", chosen, wished, subject, text.strip() + "\n")

    def language(self, kind: str, channel: str, languages: Sequence[str]) -> str:
        """The language that `render` will take."""
        return lookup(languages, self.languages(kind, channel.lower())) or FALLBACK


def lookup(wished: Iterable[str], there: Iterable[str]) -> str:
    """The first wish that can be met, by BCP-47 look-up (RFC 4647, 3.4: `es-MX` is met by `es`); empty if none is."""
    known = {each.lower(): each for each in there}
    for each in wished:
        parts = each.lower().split("-")
        while parts:
            if (tag := "-".join(parts)) in known:
                return known[tag]
            parts.pop()
            if parts and len(parts[-1]) == 1:
                parts.pop()
    return ""


def _ranges(tag: str) -> set[str]:
    parts = tag.lower().split("-")
    return {"-".join(parts[:count]) for count in range(1, len(parts) + 1)}


def facts(
    *,
    channel: str,
    language: str,
    given_name: str,
    labels: Iterable[str],
    clinic: Clinic | None,
    visit_type: VisitType | None = None,
    start: datetime | None = None,
    until: datetime | None = None,
    modality: str = "",
    link: str = "",
) -> dict[str, Any]:
    """What a template may say. The visit is named in e-mail only; what is labelled goes by its discreet name or by none."""
    labelled = any((list(labels), clinic and clinic.security_labels, visit_type and visit_type.security_labels))
    email = channel == "EMAIL"
    values: dict[str, Any] = {
        "given_name": _line(given_name),
        "clinic": _name(clinic, labelled) or _NAMELESS.get(language, _NAMELESS[FALLBACK]),
        "visit": _name(visit_type, labelled) if email else "",
        "phone": _line(clinic.phone) if clinic else "",
        "address": _address(clinic.address) if clinic and email and modality not in ("VIDEO", "PHONE") else "",
        "directions": clinic.directions.strip() if clinic and email and not labelled else "",
        "preparation": _preparation(visit_type, language) if email and not labelled else "",
        "remote": modality.lower() if modality in ("VIDEO", "PHONE") else "",
        "link": link,
    }
    if start is not None and clinic is not None:
        values |= _when(start, clinic.time_zone, language)
    if until is not None and clinic is not None:
        last = _when(until, clinic.time_zone, language)
        values |= {"until_date": last["short_date"], "until_time": last["time"]}
    return values


def _name(row: Clinic | VisitType | None, labelled: bool) -> str:
    if row is None:
        return ""
    return _line(row.discreet_name or ("" if labelled else row.name))


def _preparation(visit_type: VisitType | None, language: str) -> str:
    texts = visit_type.preparation if visit_type else {}
    found = lookup([language], texts) or lookup([FALLBACK], texts)
    return str(texts[found]).strip() if found else ""


def _address(address: Mapping[str, Any]) -> str:
    town = " ".join(filter(None, (address.get("state", ""), address.get("postal_code", ""))))
    return _line(", ".join(filter(None, (*address.get("lines", ()), address.get("city", ""), town))))


def _when(start: datetime, zone: str, language: str) -> dict[str, str]:
    local, locale = start.astimezone(ZoneInfo(zone)), _LOCALES.get(language, language)
    name = local.tzname() or ""
    if not name[:1].isalpha():  # zones without an abbreviation of their own show their offset
        name = f"UTC{local.isoformat()[-6:]}"
    short = format_skeleton("yMMMEd", local, locale=locale)
    clock = f"{format_time(local, 'short', locale=locale)} {name}".strip()
    return {"date": format_date(local, "full", locale=locale), "short_date": short, "time": clock}


def _line(value: str) -> str:
    return " ".join(value.split())


def _plain(text: str) -> str:
    """Without the thin spaces of locale data: one of them halves what fits into a text message."""
    return text.replace("\u202f", " ").replace("\u00a0", " ").replace("\u2009", " ")


def local_time(now: datetime, zones: Sequence[str], clinic_zone: str) -> str:
    """The recipient's wall time, such as "2027-03-01T09:00-05:00"."""
    zone = next(iter(zones), clinic_zone) or "UTC"
    return now.astimezone(ZoneInfo(zone)).isoformat(timespec="minutes")
