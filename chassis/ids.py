"""Ids: UUIDv7 as text, so that rows made after each other lie beside each other."""

import uuid_utils


def new_id() -> str:
    """A new UUIDv7."""
    return str(uuid_utils.uuid7())
