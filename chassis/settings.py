"""What a deployment may set, read from the environment (`CARE_…`) and passed on, never global."""

from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Issuer(BaseModel):
    """An issuer of tokens and the tenants that its tokens may belong to."""

    issuer: str
    audience: str = "care"
    jwks_url: str | None = None
    jwks_file: Path | None = None
    tenant_claim: str = "tenant"
    """The claim whose value names the tenant; `tenants` maps it to the tenant's id (RULES: settings decide)."""
    tenants: dict[str, str]


class Kafka(BaseModel):
    """How to reach the broker. `options` go to aiokafka as they are (TLS, SASL)."""

    bootstrap: str
    options: dict[str, str] = Field(default={}, repr=False)
    replication_factor: int = 1
    """Of topics that are made here; 3 in production, where topics are better made by the operator."""
    topic_configs: dict[str, str] = {}
    """Such as `min.insync.replicas` and `retention.ms` (30 days at least: the inbox keeps its marks so long)."""


class Settings(BaseSettings):
    """Settings that all services share. Times are in seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="CARE_", env_nested_delimiter="__", extra="ignore")

    environment: str = "production"
    host: str = "127.0.0.1"
    port: int = 50051
    health_port: int = 50052
    metrics_port: int = 9464
    database_url: str = Field(default="postgresql+asyncpg://localhost/care", repr=False)
    pool_size: int = Field(default=8, ge=1, le=100)
    statement_timeout: float = 10.0
    lock_timeout: float = 2.0
    """A twin that waits longer than this for its sibling is told IN_PROGRESS."""

    kafka: Kafka | None = None
    bus_url: str | None = Field(default=None, repr=False)
    """Database of the embedded bus; exactly one of `kafka` and `bus_url` is set."""

    peers: dict[str, str] = {}
    """Service name to gRPC target (`dns:///…` or `ipv4:a,b`)."""

    issuers: list[Issuer] = []
    service_key_file: Path | None = None
    """Private JWK (Ed25519) by which this service says who it is."""
    service_keys_file: Path | None = None
    """JWKS with the public keys of all services; `kid` is the service's name."""
    signing_secret: str = Field(default="", repr=False)
    """Signs page tokens and offers; the same on all replicas."""

    otlp_endpoint: str | None = None
    link_base_url: str = "http://127.0.0.1:8080"
    audit_checkpoint_file: Path | None = None

    drain_timeout: float = 8.0
    heartbeat_interval: float = 10.0
    access_stale_patient: float = 30.0
    access_stale_staff: float = 900.0
    idempotency_hours: int = 48
    token_cache: float = 60.0
    principal_cache: float = 2.0
    max_connection_age: float = 60.0
    relay_lease: float = 10.0
    concurrency: int = Field(default=200, ge=1)
    """RPCs under way at once; more are refused with OVERLOADED."""

    live_views: int = Field(default=2000, ge=1)
    """Live views that a process keeps open at once; more are refused with TOO_MANY_STREAMS."""
    live_longest: float = 600.0
    live_heartbeat: float = 15.0
    live_recheck: float = 30.0
    """How often it is judged whether the caller of an open view may still look."""
    live_queue: int = Field(default=100, ge=1)
    """Items that wait for a slow reader; beyond that they become one reset."""
