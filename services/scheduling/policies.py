"""What patients and proxies may do to their visits without staff, and until when."""

from collections.abc import Mapping
from typing import Any

from chassis.errors import FailedPrecondition, PermissionDenied


def check(verb: str, policy: Mapping[str, Any] | None, start: int, now: int) -> None:
    """Whether somebody may book, move or cancel a visit that starts then, without staff.

    Without a policy: until the start. Raises PermissionDenied `SELF_SERVICE_REFUSED`, FailedPrecondition
    `SELF_SERVICE_TOO_LATE`.
    """
    if policy and policy.get("staff_only"):
        raise PermissionDenied(
            "SELF_SERVICE_REFUSED", f"The clinic's staff must {verb} such a visit; please call.", verb=verb
        )
    minutes = (policy or {}).get("until_minutes", 0)
    if now > start - 60 * minutes:
        raise FailedPrecondition(
            "SELF_SERVICE_TOO_LATE",
            f"It is too late to {verb} such a visit without staff; please call.",
            verb=verb,
            until_minutes=str(minutes),
        )
