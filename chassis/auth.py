"""Who calls: bearer tokens of any OIDC issuer, and the short-lived credentials of our own services."""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey

from chassis.errors import Unauthenticated, Unavailable
from chassis.settings import Issuer

# Never "none", never a shared secret: a public key must not verify as an HMAC key.
_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "Ed25519"]
_SERVICES = "care-services"
_LEEWAY = 5.0
_CACHED_AT_MOST = 20_000
_REFRESH_NOT_BEFORE = 10.0
# What a file or an answer that is no key set may raise.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, JoseError)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a verified token says. `service` is set for our own services, else `issuer` and `subject` name a login."""

    tenant_id: str
    issuer: str
    subject: str
    expire_time: float
    token: str
    service: str | None = None


class Verifier:
    """Verifies bearer tokens; remembers each by its hash until min(its end, `cache` seconds).

    Raises Unauthenticated `TOKEN_MISSING`, `TOKEN_INVALID`, `TOKEN_EXPIRED`, `TENANT_UNKNOWN`; Unavailable
    `ISSUER_UNAVAILABLE` where an issuer's keys can't be had. Verifying costs about 0.5 CPU-ms, a remembered one 5 us.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        service_keys_file: Path | None = None,
        cache: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keys = {issuer.issuer: _Keys(issuer) for issuer in issuers}
        self._service_keys_file = service_keys_file
        self._service_keys: KeySet | None = None
        self._cache_for = cache
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, Identity]] = OrderedDict()

    async def verify(self, token: str) -> Identity:
        """The identity behind a token."""
        if not token:
            raise Unauthenticated("TOKEN_MISSING", "Send a bearer token in the Authorization header.")
        digest = hashlib.sha256(token.encode()).digest()
        now = self._clock()
        known = self._known.get(digest)
        if known is not None and known[0] > now:
            return known[1]
        identity = await self._read(token, now)
        self._known[digest] = (min(identity.expire_time, now + self._cache_for), identity)
        while len(self._known) > _CACHED_AT_MOST:
            self._known.popitem(last=False)
        return identity

    async def _read(self, token: str, now: float) -> Identity:
        issuer = _unverified_issuer(token)
        if issuer == _SERVICES:
            return self._read_service(token, now)
        keys = self._keys.get(issuer)
        if keys is None:
            raise Unauthenticated("TOKEN_INVALID", "The token's issuer is not known here.")
        known = await keys.get()
        try:
            claims = jwt.decode(token, known, algorithms=_ALGORITHMS).claims
        except (JoseError, ValueError) as error:
            fresh = await keys.refresh(known)
            if fresh is None:
                raise Unauthenticated("TOKEN_INVALID", "The token can't be verified.") from error
            try:
                claims = jwt.decode(token, fresh, algorithms=_ALGORITHMS).claims
            except (JoseError, ValueError) as again:
                raise Unauthenticated("TOKEN_INVALID", "The token can't be verified.") from again
        expires = _checked(claims, issuer, keys.issuer.audience, now)
        tenant = keys.issuer.tenants.get(str(claims.get(keys.issuer.tenant_claim, "")))
        if tenant is None:
            raise Unauthenticated("TENANT_UNKNOWN", "The token belongs to no tenant of this system.")
        subject = claims.get("sub")
        if not isinstance(subject, str) or not subject:
            raise Unauthenticated("TOKEN_INVALID", "The token names no subject.")
        return Identity(tenant, issuer, subject, expires, token)

    def _read_service(self, token: str, now: float) -> Identity:
        try:
            decoded = jwt.decode(token, self._service_keys or self._read_service_keys(), algorithms=["Ed25519"])
        except (JoseError, ValueError):
            try:  # keys are rotated by replacing the file
                decoded = jwt.decode(token, self._read_service_keys(), algorithms=["Ed25519"])
            except (JoseError, ValueError) as error:
                raise Unauthenticated("TOKEN_INVALID", "The token can't be verified.") from error
        expires = _checked(decoded.claims, _SERVICES, "care", now)
        service = str(decoded.claims.get("sub", ""))
        # Each service signs with its own key: one that is stolen speaks for nobody else.
        if decoded.header.get("kid") != service:
            raise Unauthenticated("TOKEN_INVALID", "The token's key belongs to another service.")
        return Identity("", _SERVICES, f"system:{service}", expires, token, service)

    def _read_service_keys(self) -> KeySet:
        if self._service_keys_file is None:
            raise Unauthenticated("TOKEN_INVALID", "Credentials of services are not known here.")
        try:
            keys = KeySet.import_key_set(json.loads(self._service_keys_file.read_text()))
        except (OSError, *_UNREADABLE) as error:
            if self._service_keys is None:
                raise Unavailable("ISSUER_UNAVAILABLE", "The services' keys can't be read now; try again.") from error
            return self._service_keys
        self._service_keys = keys
        return keys


def _unverified_issuer(token: str) -> str:
    try:
        claims = json.loads(_part(token, 1))
        issuer = claims["iss"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise Unauthenticated("TOKEN_INVALID", "The token is not a signed JWT.") from error
    return str(issuer)


def _part(token: str, index: int) -> bytes:
    import base64

    part = token.split(".")[index]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def _checked(claims: dict[str, Any], issuer: str, audience: str, now: float) -> float:
    expires = claims.get("exp")
    if not isinstance(expires, int | float):
        raise Unauthenticated("TOKEN_INVALID", "The token has no end.")
    if not expires + _LEEWAY >= now:  # so that NaN is refused
        raise Unauthenticated("TOKEN_EXPIRED", "The token has expired; sign in again.")
    not_before = claims.get("nbf", 0)
    if not isinstance(not_before, int | float) or not_before - _LEEWAY > now:
        raise Unauthenticated("TOKEN_INVALID", "The token is not valid yet.")
    audiences = claims.get("aud", [])
    if audience not in (audiences if isinstance(audiences, list) else [audiences]):
        raise Unauthenticated("TOKEN_INVALID", "The token is meant for another audience.")
    if claims.get("iss") != issuer:
        raise Unauthenticated("TOKEN_INVALID", "The token's issuer is not known here.")
    return float(expires)


class _Keys:
    """The public keys of one issuer, read again at most every ten seconds when a token's key is unknown."""

    def __init__(self, issuer: Issuer) -> None:
        self.issuer = issuer
        self._set: KeySet | None = None
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def get(self) -> KeySet:
        if self._set is None:
            await self.refresh()
        if self._set is None:
            raise Unavailable("ISSUER_UNAVAILABLE", "The issuer's keys can't be read now; try again.")
        return self._set

    async def refresh(self, known: KeySet | None = None) -> KeySet | None:
        """The keys read anew, also by somebody else since they were `known`; None where that was tried a moment ago or failed."""
        async with self._lock:  # one refresh for a stampede
            if self._set is not known:
                return self._set
            if time.monotonic() - self._tried_at < _REFRESH_NOT_BEFORE:
                return None
            self._tried_at = time.monotonic()
            try:
                if self.issuer.jwks_file is not None:
                    text = self.issuer.jwks_file.read_text()
                else:
                    async with httpx2.AsyncClient(timeout=5, follow_redirects=False) as client:
                        answer = await client.get(self.issuer.jwks_url or "")
                        answer.raise_for_status()
                        text = answer.text
                self._set = KeySet.import_key_set(json.loads(text))
            except (OSError, httpx2.HTTPError, *_UNREADABLE):
                return None
            return self._set


class Credential:
    """This service's own credential: a token of one minute, signed with its own key."""

    def __init__(self, service: str, key_file: Path | None, *, clock: Callable[[], float] = time.time) -> None:
        self.service = service
        self._key_file = key_file
        self._clock = clock
        self._token = ""
        self._renew_at = 0.0

    def token(self) -> str:
        """A token that is valid for at least 20 s more. Raises Unavailable `NO_CREDENTIAL` without a key."""
        now = self._clock()
        if now >= self._renew_at:
            if self._key_file is None:
                raise Unavailable("NO_CREDENTIAL", "This service has no key to say who it is (service_key_file).")
            key = OKPKey.import_key(json.loads(self._key_file.read_text()))
            claims = {"iss": _SERVICES, "sub": self.service, "aud": "care", "iat": int(now), "exp": int(now) + 60}
            self._token = jwt.encode({"alg": "Ed25519", "kid": self.service}, claims, key, algorithms=["Ed25519"])
            self._renew_at = now + 40
        return self._token
