"""Small signed values that clients carry for us: page tokens and offers."""

import base64
import binascii
import hashlib
import hmac
from typing import Any

import orjson


class Signer:
    """Signs JSON values with HMAC-SHA256; the purpose keeps a token of one kind from passing as another."""

    def __init__(self, secret: str, purpose: str) -> None:
        if not secret:
            raise ValueError("signing_secret is not set")
        self._key = hashlib.sha256(f"{purpose}\0{secret}".encode()).digest()

    def sign(self, value: Any) -> str:
        """URL-safe text that holds and proves `value`. It is readable: put nothing of a patient in it."""
        body = orjson.dumps(value)
        mac = hmac.digest(self._key, body, "sha256")[:16]
        return base64.urlsafe_b64encode(mac + body).rstrip(b"=").decode()

    def open(self, token: str) -> Any | None:
        """The value, or None where the token is not one of ours."""
        try:
            raw = base64.b64decode(token.encode() + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        mac, body = raw[:16], raw[16:]
        if not hmac.compare_digest(mac, hmac.digest(self._key, body, "sha256")[:16]):
            return None
        return orjson.loads(body)
