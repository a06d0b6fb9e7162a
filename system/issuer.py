"""The development issuer of tokens: signs in whoever it is told to, so it never runs in production."""

import json
import os
import time
from typing import Final

from joserfc import jwt
from joserfc.jwk import ECKey

from chassis.settings import Issuer
from system.keys import Keys

ISSUER: Final = "https://issuer.care.localhost"
AUDIENCE: Final = "care"
TENANT_CLAIM: Final = "sample"
TENANT_ID: Final = "019a0000-0000-7000-8000-00000000ca5e"
"""The sample tenant's id, the same on every machine."""
WARNING: Final = "development issuer: it signs in anybody as anyone; never for real patients"

ROLES: Final = (
    "coordinator",
    "scheduler",
    "front_desk",
    "nurse",
    "clinician",
    "manager",
    "quality",
    "privacy_officer",
    "integration_client",
    "external_partner",
    "admin",
)
"""Roles that the sample tenant has a staff member for."""


class NotInProduction(RuntimeError):
    """A development tool was asked to work where CARE_ENVIRONMENT is `production`."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} refuses to work in production (CARE_ENVIRONMENT=production)")


def forbid_production(what: str, environment: str | None = None) -> None:
    """Raises NotInProduction where `environment`, by default CARE_ENVIRONMENT, says so. Unset means a developer's machine."""
    if (environment or os.environ.get("CARE_ENVIRONMENT", "")).strip().lower() == "production":
        raise NotInProduction(what)


def staff_subject(role: str) -> str:
    """The subject of the sample staff member who holds a role. ValueError for a role that nobody there holds."""
    if role not in ROLES:
        raise ValueError(f"no sample staff member is {role}; roles are {', '.join(ROLES)}")
    return f"{role}@sample"


def patient_subject(patient_id: str) -> str:
    """The subject of a patient's login."""
    return f"patient-{patient_id}@sample"


def accepted(keys: Keys) -> Issuer:
    """What services must be told, so that they take this issuer's tokens."""
    return Issuer(issuer=ISSUER, audience=AUDIENCE, jwks_file=keys.issuer_keys_file, tenants={TENANT_CLAIM: TENANT_ID})


class DevelopmentIssuer:
    """Signs tokens with the issuer's key of a data folder. Raises NotInProduction when it is made."""

    def __init__(self, keys: Keys, environment: str | None = None) -> None:
        forbid_production("the development issuer", environment)
        self._key = ECKey.import_key(json.loads(keys.issuer_key_file.read_text()))

    def issue(
        self,
        *,
        role: str = "",
        patient_id: str = "",
        subject: str = "",
        tenant: str = TENANT_CLAIM,
        seconds: float = 12 * 3600,
    ) -> str:
        """A token for the sample staff member who holds `role`, for a patient's login, or for any subject: exactly one of the three."""
        if sum(map(bool, (role, patient_id, subject))) != 1:
            raise ValueError("exactly one of role, patient_id and subject")
        subject = subject or (staff_subject(role) if role else patient_subject(patient_id))
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "tenant": tenant,
            "iat": now,
            "exp": now + int(seconds),
        }
        header = {"alg": "ES256", "kid": self._key.kid, "typ": "JWT"}
        return jwt.encode(header, claims, self._key, algorithms=["ES256"])
