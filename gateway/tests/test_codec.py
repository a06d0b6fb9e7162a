"""The codec agrees with protobuf's own JSON on every message of the contract, and is stricter with what comes in."""

import random
from typing import Any

import orjson
import pytest
from care.feedback.v1 import feedback_pb2
from care.patients.v1 import patients_pb2
from care.scheduling.v1 import appointments_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.errors import Invalid
from gateway.codec import Codec, is_map, message_class
from gateway.contract import files

CODEC = Codec()
F = FieldDescriptor
INT64 = {F.TYPE_INT64, F.TYPE_UINT64}


def _nested(kind: Descriptor) -> list[Descriptor]:
    return [kind, *(inner for each in kind.nested_types if not each.GetOptions().map_entry for inner in _nested(each))]


KINDS = [inner for file in files() for kind in file.message_types_by_name.values() for inner in _nested(kind)]


def _text(rng: random.Random) -> str:
    return "".join(rng.choice('aB7 -_."\\/é漢😀\u2028\u00a0\t\n') for _ in range(rng.randrange(6)))


def _scalar(field: FieldDescriptor, rng: random.Random) -> Any:
    if field.enum_type is not None:
        return rng.choice(field.enum_type.values).number
    if field.type == F.TYPE_STRING:
        return _text(rng)
    if field.type == F.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == F.TYPE_BYTES:
        return rng.randbytes(rng.randrange(8))
    if field.type == F.TYPE_DOUBLE:
        return rng.choice(
            [0.0, -0.0, 1.0, -71.0589, 1e300, 5e-324, float("inf"), float("-inf"), rng.uniform(-180, 180)]
        )
    bits = 63 if field.type in INT64 else 31
    return rng.choice([0, 1, -1, (1 << bits) - 1, -(1 << bits), rng.randrange(1 << bits)])


def _fill(message: Any, rng: random.Random, depth: int = 0) -> None:
    name = message.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        message.seconds = rng.choice([0, 1, -1, -30610224000, 32503679999, rng.randrange(-(10**10), 10**10)])
        message.nanos = rng.choice([0, 1, 120_000_000, 1_000, 999_999_999])
        message.SetInParent()
        return
    if name == "google.protobuf.FieldMask":
        message.paths.extend(rng.sample(["names", "birth_date", "period.start_time", "telecom"], rng.randrange(4)))
        message.SetInParent()
        return
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.4:
            continue
        if is_map(field):
            for _ in range(rng.randrange(3)):
                getattr(message, field.name)[_text(rng)] = _text(rng)
        elif field.message_type is not None:
            if depth > 4:
                continue
            children = (
                [getattr(message, field.name).add() for _ in range(rng.randrange(3))]
                if field.is_repeated
                else [getattr(message, field.name)]
            )
            for child in children:
                child.SetInParent()
                _fill(child, rng, depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend([_scalar(field, rng) for _ in range(rng.randrange(4))])
        else:
            setattr(message, field.name, _scalar(field, rng))


def _random_message(kind: Descriptor, seed: int) -> Message:
    message = message_class(kind)()
    _fill(message, random.Random(seed))
    return message


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 2**32))
def test_every_message_of_the_contract_becomes_the_json_that_protobuf_makes_of_it(kind: Descriptor, seed: int) -> None:
    message = _random_message(kind, seed)
    ours = orjson.loads(orjson.dumps(CODEC.to_json(message)))
    assert ours == json_format.MessageToDict(message)
    assert CODEC.from_json(ours, type(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 2**32))
def test_original_names_are_taken_like_json_names(kind: Descriptor, seed: int) -> None:
    message = _random_message(kind, seed)
    original = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert CODEC.from_json(original, type(message)) == message


APPOINTMENT = appointments_pb2.Appointment


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        ({"patientid": "x"}, "FIELD_UNKNOWN", "patientid"),
        ({"Maria Sánchez": "x"}, "FIELD_UNKNOWN", "?"),
        ({"participants": [{}, {"actor": {"kind": "x"}}]}, "FIELD_UNKNOWN", "participants[1].actor.kind"),
        ({"patientId": "a", "patient_id": "b"}, "FIELD_INVALID", "patientId"),
        ({"patientId": None, "patient_id": "b"}, "FIELD_INVALID", "patientId"),
        ({"patientId": 5}, "FIELD_INVALID", "patientId"),
        ({"patientId": "a\x00b"}, "FIELD_INVALID", "patientId"),
        ({"status": "booked"}, "FIELD_INVALID", "status"),
        ({"status": 99}, "FIELD_INVALID", "status"),
        ({"status": True}, "FIELD_INVALID", "status"),
        ({"lateCancel": "true"}, "FIELD_INVALID", "lateCancel"),
        ({"lateCancel": 1}, "FIELD_INVALID", "lateCancel"),
        ({"overbooking": 1.5}, "FIELD_INVALID", "overbooking"),
        ({"overbooking": True}, "FIELD_INVALID", "overbooking"),
        ({"overbooking": 2**31}, "FIELD_INVALID", "overbooking"),
        ({"scheduleVersion": "9223372036854775808"}, "FIELD_INVALID", "scheduleVersion"),
        ({"scheduleVersion": " 1"}, "FIELD_INVALID", "scheduleVersion"),
        ({"participants": {}}, "FIELD_INVALID", "participants"),
        ({"participants": [None]}, "FIELD_INVALID", "participants[0]"),
        ({"securityLabels": ["R", None]}, "FIELD_INVALID", "securityLabels[1]"),
        ({"cancelationReason": []}, "FIELD_INVALID", "cancelationReason"),
        ({"startTime": "2026-02-30T10:00:00Z"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "2026-02-03T10:00:00"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "2026-02-03T10:00:60Z"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "0001-01-01T00:00:00Z"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "1000-01-01T00:00:00+01:00"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "9999-12-31T23:59:59.999999999Z"}, "FIELD_INVALID", "startTime"),
        ({"startTime": "2026-02-03T10:00:00.1234567890Z"}, "FIELD_INVALID", "startTime"),
        ({"startTime": 1700000000}, "FIELD_INVALID", "startTime"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path_and_never_its_value(value: Any, reason: str, field: str) -> None:
    with pytest.raises(Invalid) as refused:
        CODEC.from_json(value, APPOINTMENT)
    assert (refused.value.reason, refused.value.metadata) == (reason, {"field": field})
    assert "Sánchez" not in refused.value.message


def test_a_map_key_is_a_value_and_is_not_shown() -> None:
    with pytest.raises(Invalid) as refused:
        CODEC.from_json({"items": [{"text": {"Maria": 5}}]}, feedback_pb2.Questionnaire)
    assert refused.value.metadata == {"field": "items[0].text[*]"}


def test_null_is_absent() -> None:
    message = CODEC.from_json({"patientId": None, "participants": None, "startTime": None}, APPOINTMENT)
    assert message == APPOINTMENT()


def test_an_empty_object_is_present() -> None:
    assert CODEC.from_json({"patient": {}}, patients_pb2.UpdatePatientRequest).HasField("patient")


def test_instants_with_an_offset_become_utc() -> None:
    message = CODEC.from_json({"startTime": "2026-03-08T01:30:00.5-05:00"}, APPOINTMENT)
    assert CODEC.to_json(message) == {"startTime": "2026-03-08T06:30:00.500Z"}


def test_a_number_may_come_as_a_text_as_proto3_allows() -> None:
    assert CODEC.from_json({"scheduleVersion": "7", "overbooking": 2.0}, APPOINTMENT) == APPOINTMENT(
        schedule_version=7, overbooking=2
    )


def test_an_enum_value_that_is_new_to_us_leaves_as_a_number() -> None:
    assert CODEC.to_json(APPOINTMENT(status=77)) == {"status": 77}  # type: ignore[arg-type]
