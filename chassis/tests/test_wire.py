"""Rows, messages and plain values: every message of the contract comes back as it went."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from care.patients.v1 import consents_pb2, patients_pb2, staff_pb2, tasks_pb2
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import Invalid
from chassis.tests.contract import MESSAGES
from chassis.wire import enum_names, etag_of, given, plain, to_proto, to_time

NOW = datetime(2026, 3, 8, 7, 59, 59, 123456, tzinfo=UTC)
_BYTES = FieldDescriptor.TYPE_BYTES


def sample(descriptor: Descriptor, depth: int = 3) -> Message:
    """A message with every field set, nested ones down to a depth."""
    built = message_factory.GetMessageClass(descriptor)()
    for number, field in enumerate(descriptor.fields):
        if field.containing_oneof is not None and field.containing_oneof.fields[0] is not field:
            continue
        if field.type == _BYTES:
            continue
        if field.message_type is not None:
            if field.message_type.GetOptions().map_entry:
                getattr(built, field.name)["key"] = _scalar(field.message_type.fields_by_name["value"], number)
            elif field.message_type.full_name == "google.protobuf.Timestamp":
                getattr(built, field.name).FromDatetime(NOW)
            elif field.message_type.full_name == "google.protobuf.FieldMask" or not depth:
                continue
            elif field.is_repeated:
                getattr(built, field.name).extend([sample(field.message_type, depth - 1)] * 2)
            else:
                getattr(built, field.name).SetInParent()
                getattr(built, field.name).CopyFrom(sample(field.message_type, depth - 1))
        elif field.is_repeated:
            getattr(built, field.name).extend([_scalar(field, number), _scalar(field, number + 1)])
        else:
            setattr(built, field.name, _scalar(field, number))
    return built


def _scalar(field: FieldDescriptor, number: int) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name} {number} é😀"
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return number + 0.5
    return number + 1


SAMPLES = [sample(descriptor_pool.Default().FindMessageTypeByName(name)) for name in MESSAGES]


def test_every_message_comes_back_from_its_plain_values() -> None:
    assert len(SAMPLES) > 200
    for message in SAMPLES:
        assert to_proto(json.loads(json.dumps(plain(message))), type(message)) == message


def test_every_message_comes_back_from_what_it_gives_to_columns() -> None:
    for message in SAMPLES:
        values = given(message, read_only=frozenset())
        assert to_proto(values, type(message)) == message
        assert to_proto(SimpleNamespace(**values), type(message)) == message


def test_an_empty_message_gives_nothing_and_comes_back_empty() -> None:
    for message in SAMPLES:
        kind = type(message)
        assert plain(kind()) == {} == given(kind())
        assert to_proto({}, kind) == kind()


def test_a_mask_clears_what_it_names_and_leaves_the_rest() -> None:
    pool = staff_pb2.Pool(name="Night", purpose="urgent", id="1")
    values = given(pool, FieldMask(paths=["name", "staff_ids", "active", "id", "create_time"]))
    assert values == {"name": "Night", "staff_ids": [], "active": None}
    task = tasks_pb2.Task()
    assert given(task, FieldMask(paths=["due_time", "note", "owner"])) == {"due_time": None, "note": "", "owner": None}


@pytest.mark.parametrize("path", ["nonsense", "pool.name", "Name", "staff_ids[0]", "__class__", ""])
def test_a_mask_of_an_unknown_path_is_refused(path: str) -> None:
    with pytest.raises(Invalid) as refused:
        given(staff_pb2.Pool(name="Night"), FieldMask(paths=[path]))
    assert refused.value.reason == "FIELD_UNKNOWN"


def test_an_optional_field_that_is_set_to_its_default_is_given() -> None:
    assert given(staff_pb2.Pool(active=False)) == {"active": False}
    assert given(staff_pb2.Pool(active=False), FieldMask(paths=["active"])) == {"active": False}


def test_what_json_holds_beside_the_fields_is_passed_over() -> None:
    step = {"action": "assign", "reason_code": None, "time": NOW.isoformat(), "left_behind": {"by": ["an", "older"]}}
    owner = {"type": "Staff", "id": 7}
    built = to_proto({"history": [step], "owner": owner, "priority": "77", "version": 4}, tasks_pb2.Task)
    assert (built.history[0].action, built.history[0].reason_code) == ("assign", "")
    assert to_time(built.history[0].time) == NOW
    assert (built.owner.type, built.owner.id, built.priority, built.etag) == ("Staff", "7", 77, etag_of(4))
    assert step["time"] == NOW.isoformat()  # the source stays as it was


def test_times_keep_their_microseconds_and_become_utc() -> None:
    eastern = NOW.astimezone(ZoneInfo("America/New_York"))
    for value in (eastern, eastern.isoformat(), NOW):
        assert to_time(to_proto({"due_time": value}, tasks_pb2.Task).due_time) == NOW


@pytest.mark.parametrize("seconds", [10**15, -(10**15)])
def test_a_time_out_of_range_is_the_callers_mistake(seconds: int) -> None:
    with pytest.raises(Invalid):
        given(tasks_pb2.Task(due_time=Timestamp(seconds=seconds)))


def test_a_value_that_this_build_does_not_know_is_kept() -> None:
    newer = consents_pb2.Consent(basis=77)  # type: ignore[arg-type]
    assert given(newer) == {"basis": "77"}
    assert to_proto(given(newer), consents_pb2.Consent) == newer
    assert enum_names(consents_pb2.Consent.Status, [1, 77]) == ["ACTIVE", "77"]


def test_the_etag_is_made_of_the_version_and_extras_come_first() -> None:
    row = SimpleNamespace(id="1", version=7, name="Night")
    assert to_proto(row, staff_pb2.Pool).etag == etag_of(7) == '"7"'
    assert to_proto(row, staff_pb2.Pool, name="Day").name == "Day"
    assert to_proto(row, staff_pb2.Pool, etag='"9"').etag == '"9"'


def test_what_a_row_lacks_stays_unset() -> None:
    built = to_proto(SimpleNamespace(id="1", names=None), patients_pb2.Patient)
    assert not built.names
    assert not built.HasField("create_time")


@pytest.mark.parametrize("seconds", [-62135596800, -30610224001, 32503680000, 253402300799, 253402300800])
def test_instants_at_the_ends_of_the_calendar_are_refused(seconds: int) -> None:
    with pytest.raises(Invalid) as refused:
        to_time(Timestamp(seconds=seconds))
    assert refused.value.reason == "TIME_INVALID"
