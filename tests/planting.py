"""Rows put straight into the tables, one of each aggregate: what reflection alone can make of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from sqlalchemy import ARRAY, BigInteger, Boolean, DateTime, Enum, Float, Integer, Uuid, insert
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from chassis.ids import new_id
from chassis.model import Aggregate
from chassis.wire import plain
from gateway.contract import files
from tests.minimal import minimal


async def plant(
    connection: AsyncConnection,
    model: type[Aggregate],
    *,
    tenant_id: str,
    row_id: str,
    subject_id: str = "",
    **values: Any,
) -> None:
    """Insert a row with the least that its columns take."""
    table: Any = model.__table__
    message = message_of(model)
    row: dict[str, Any] = {"tenant_id": tenant_id, "id": row_id, "version": 1}
    if model.subject_field not in (None, "id"):
        row[model.subject_field or ""] = subject_id
    for column in table.columns:
        if column.name in values:
            row[column.name] = values[column.name]
        elif (
            column.name not in row and not column.nullable and column.server_default is None and column.default is None
        ):
            row[column.name] = _value(column, message)
        elif column.name not in row and message is not None and column.name in message.fields_by_name:
            # A default may be none that the contract knows.
            default = getattr(column.default, "arg", None)
            if isinstance(default, str) and message.fields_by_name[column.name].enum_type is not None and not default:
                row[column.name] = _value(column, message)
    await connection.execute(insert(table).values(**row))


def message_of(model: type[Aggregate]) -> Descriptor | None:
    """The message of the same name."""
    for file in files():
        if (
            model.__module__.startswith(f"services.{file.package.split('.')[1]}.")
            and model.__name__ in file.message_types_by_name
        ):
            return file.message_types_by_name[model.__name__]
    return None


def _value(column: Any, message: Descriptor | None) -> Any:
    kind = column.type
    field = message.fields_by_name.get(column.name) if message is not None else None
    if isinstance(kind, ARRAY):
        return []
    if isinstance(kind, JSONB):
        return _json(field)
    if isinstance(kind, Enum):
        return next(iter(kind.enum_class or kind.enums))
    if isinstance(kind, Uuid):
        return new_id()
    if isinstance(kind, DateTime):
        return datetime.now(UTC).replace(microsecond=0) + timedelta(days=8)
    if isinstance(kind, Boolean):
        return False
    if isinstance(kind, Integer | BigInteger | Float):
        return 1
    if field is not None and field.enum_type is not None:
        return next(value.name for value in field.enum_type.values if value.number)
    return f"x-{new_id()}"  # some are unique


def _json(field: FieldDescriptor | None) -> Any:
    if field is None or field.is_repeated:
        return []
    return plain(minimal(field.message_type)) if field.message_type is not None else {}
