"""Weekly hours as a CSV file has them: what a line says, and every line that is wrong."""

from pathlib import Path

import pytest

from system.importing.bundles import NPI, Key
from system.importing.hours import read_hours
from system.importing.visits_file import FileBroken

HEADER = (
    "practitioner,clinic,weekday,from,to,visit_types,valid_from,valid_until,staff_only,release_hours,clinic_system\n"
)


def read(folder: Path, text: str) -> tuple[list[object], list[tuple[int, str]]]:
    file = folder / "hours.csv"
    file.write_text(text, encoding="utf-8")
    blocks, problems = read_hours(file)
    return list(blocks), problems


def test_a_line_is_a_block_on_each_of_its_days(tmp_path: Path) -> None:
    (tmp_path / "hours.csv").write_text(HEADER + "5,main,Sa-Mo,9:00,12:00,a;b,2027-03-01,2027-06-30,Yes,48,urn:c\n")
    ((block,), problems) = read_hours(tmp_path / "hours.csv")
    assert problems == []
    assert (block.line, block.practitioner, block.clinic) == (2, Key(NPI, "5"), Key("urn:c", "main"))
    assert block.visit_types == ("a", "b")
    rest = {"start": "09:00", "end": "12:00", "validFrom": "2027-03-01", "validUntil": "2027-06-30"}
    rest_ = {**rest, "staffOnly": True, "releaseHours": 48}
    assert block.hours == tuple({"weekday": day, **rest_} for day in (6, 7, 1))


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    _, problems = read(
        tmp_path,
        HEADER
        + "5,main,Funday,9:00,12:00,,,,,,\n5,main,Mo,9,12:00,,,,,,\n5,main,Mo,9:00,24:00,,,,,,\n,main,Mo,9:00,12:00,,,,,,\n"
        + "5,main,Mo,9:00,12:00,,1.3.2027,,,,\n5,main,Mo,9:00,12:00,,,,maybe,,\n5,main,Mo,9:00,12:00,,,,,-1,\n5,main\n"
        + f"5,main,Mo,9:00,12:00,,,,,{'9' * 5000},\n",
    )
    assert [line for line, _ in problems] == [*range(2, 11)]
    assert [what.partition(":")[0] for _, what in problems] == [
        "weekday", "from", "to", "has no practitioner", "valid_from", "staff_only", "release_hours",
        "has not as many columns as the header", "release_hours",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no column practitioner"),
        ("practitioner,clinic,weekday,from,to,colour\n", "means nothing: colour"),
        (HEADER, "holds no hours"),
        (HEADER + '"5', "is no CSV"),
    ],
)
def test_what_holds_no_hours_is_refused_whole(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(FileBroken) as broken:
        read(tmp_path, text)
    assert why in str(broken.value)
