"""What notifications is told by its environment, beyond what all services are."""

from pydantic import Field

from chassis.settings import Settings


class NotificationsSettings(Settings):
    """Providers, rates and bounds. A channel without a URL isn't used. Times in seconds."""

    smtp_url: str = Field(default="", repr=False)
    """`smtp://[user:password@]host[:port]` (STARTTLS where offered), `smtp+starttls://` (required), `smtps://`."""
    smtp_from: str = ""
    sms_url: str = ""
    """Base of the provider's API; `/2010-04-01/Accounts/{account}/Messages.json` is added."""
    sms_account: str = ""
    sms_token: str = Field(default="", repr=False)
    sms_from: str = ""
    sms_callback_url: str = ""
    """Base URL of a receiver of one's own that the provider tells what came of a message; none is told where empty."""

    sms_rate: float = Field(default=50.0, gt=0)
    """Calls per second and replica."""
    email_rate: float = Field(default=50.0, gt=0)
    provider_timeout: float = 10.0
    provider_connections: int = Field(default=20, ge=1)

    send_every: float = 1.0
    send_batch: int = Field(default=25, ge=1, le=50)
    send_lanes: int = Field(default=4, ge=1)
    """Batches under way at once: a slow provider holds up one."""
    send_lease: float = 30.0
    """Longer than a call of a provider may take."""
    check_timeout: float = 0.8
    check_age: float = 0.95
    """From before the last check's read is sent to the provider's call; RULES F allows 1 s."""
    service_away_pause: float = 2.0
    tries_at_most: int = Field(default=5, ge=1)
    retry_base: float = 5.0
    """Doubled with each try, at most 5 minutes."""
    survey_useful: float = 14 * 86400.0
    """An invitation that could not leave for so long is dropped."""
