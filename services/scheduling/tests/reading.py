"""How other programs read our calendars: none of these shares a line with the one that writes them."""

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import icalendar
import pytest
from dateutil.tz import tzical

_FOLDER = Path(__file__).parent / "icaljs"
_ROOT = Path(__file__).resolve().parents[3]
_SHOWN = ("UID", "SEQUENCE", "STATUS", "SUMMARY", "LOCATION")


def by_icalendar(text):
    """By the Python package, which is kept from knowing the zones by their names: what stands in the file must do."""
    calendar = icalendar.Calendar.from_ical(_nameless(text))
    return [
        {
            "start": round(one["DTSTART"].dt.timestamp()),
            "end": round(one["DTEND"].dt.timestamp()),
            **{name.lower(): _plain(one.get(name)) for name in _SHOWN},
        }
        for one in calendar.walk("VEVENT")
    ]


def by_dateutil(text):
    """By dateutil's reader of zones and a reader of lines of our own: times only."""
    lines = text.replace("\r\n ", "").split("\r\n")
    found, zones = [], None
    if "BEGIN:VTIMEZONE" in lines:
        last = len(lines) - 1 - lines[::-1].index("END:VTIMEZONE")
        zones = tzical(_Lines("\n".join(lines[lines.index("BEGIN:VTIMEZONE") : last + 1])))
    for line in lines:
        name, _, value = line.partition(":")
        if line == "BEGIN:VEVENT":
            found.append({})
        elif name.startswith(("DTSTART", "DTEND")) and found:
            at = datetime.strptime(value.rstrip("Z"), "%Y%m%dT%H%M%S")
            _, _, zone = name.partition(";TZID=")
            at = at.replace(tzinfo=zones.get(zone) if zone else UTC)
            found[-1]["start" if name.startswith("DTSTART") else "end"] = round(at.timestamp())
        elif name == "UID":
            found[-1]["uid"] = value
    return found


def by_icaljs(text):
    """By the JavaScript that Thunderbird and Nextcloud read calendars with."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        pytest.skip("node and npm are not on this machine")
    folder = _ROOT / ".cache" / "icaljs"
    folder.mkdir(parents=True, exist_ok=True)
    for file in _FOLDER.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    if not (folder / "node_modules" / "ical.js").exists():
        order = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        if subprocess.run(order, cwd=folder, timeout=120, capture_output=True).returncode:
            pytest.skip("ical.js can't be had from the npm registry")
    told = subprocess.run(
        [node, "expand.mjs"], cwd=folder, input=text.encode(), capture_output=True, timeout=60, check=True
    )
    return json.loads(told.stdout)


class _Lines:
    """What `tzical` takes for a file."""

    name = "calendar"

    def __init__(self, text):
        self._text = text

    def read(self):
        return self._text


def _nameless(text):
    """With names for the zones that nobody knows; new ones each time, since the reader remembers those that it met."""
    for zone in {line[5:] for line in text.split("\r\n") if line.startswith("TZID:")}:
        name = f"Elsewhere {uuid4()}"
        text = text.replace(f"TZID:{zone}\r\n", f"TZID:{name}\r\n").replace(f";TZID={zone}:", f";TZID={name}:")
    return text


def _plain(value):
    return value if value is None or isinstance(value, int) else str(value)
