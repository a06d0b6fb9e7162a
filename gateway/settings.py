"""What may be set of the gateway, beside what all services share (`CARE_…`)."""

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from chassis.settings import Settings


class GatewaySettings(Settings):
    """Times are in seconds, sizes in bytes."""

    port: int = 8080
    request_timeout: float = 10.0
    """Deadline of a request: what is left of it is passed on to the services."""
    leg_timeout: float = 0.8
    """Deadline of each service's part of an aggregate."""
    batch_legs: bool = True
    """Joins several callers' parts of aggregates into one RPC per service; off: one RPC per part."""
    body_limit: int = Field(default=1 << 20, ge=1024)
    access_log: bool = True
    streams: int = Field(default=2000, ge=1)
    """Live views that clients have open at once at this gateway; more are refused with TOO_MANY_STREAMS."""
    streams_per_login: int = Field(default=10, ge=1)
    ready_grace: float = 15.0
    """From then on one reachable service is enough to be ready, since aggregates degrade."""
    drain_delay: float = 0.0
    """How long requests are still taken after /readyz said no: the time in which a load balancer notices."""
    allowed_origins: Annotated[list[str], NoDecode] = []
    """Origins of browser applications that may call; `https://a.example,https://b.example` in the environment."""

    @field_validator("allowed_origins", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [each.strip() for each in value.split(",") if each.strip()] if isinstance(value, str) else value
