"""What a deployment may set about booking."""

from typing import Literal, Self

from pydantic import Field, model_validator

from chassis.settings import Settings


class SchedulingSettings(Settings):
    """Settings of the scheduling service. Times are in seconds."""

    hold_default: float = 300
    """How long a hold stands where the caller names no time."""
    offer_lifetime: float = 900
    """How long an offered slot's token is taken."""
    no_show_grace: float = 900
    """After the start; nobody is marked as a no-show before it is over."""
    arrival_early: float = 7200
    """A patient may have arrived so long before the start, though the clinic's day of the visit has not begun."""
    walk_in: float = 900
    """Staff may still book a start that is past by so much, unless the visit type wants notice."""
    occupancy_kept: float = Field(default=7 * 86400, ge=2 * 86400)
    """Who and what was taken is deleted so long after its end; not before the clinic's day is over everywhere."""
    freed_slots_kept: float = Field(default=400 * 86400, ge=7 * 86400)
    """What became of a freed slot is deleted so long after it was freed: waitlist measures reach back so far."""
    waitlist_kept: float = 180 * 86400
    """How long an entry waits that names no end."""
    backfill_every: float = 1.0
    """How often freed slots are looked for."""
    backfill_retry: float = 30
    """How soon a slot is looked at again whose candidates have another offer in hand."""
    backfill_lockout: float = 4 * 3600
    """So long before its start a slot is no longer offered, nor an offer accepted; a visit type may ask for more."""
    offer_standing: float = 2 * 3600
    """How long a slot is held for a candidate."""
    offer_standing_at_least: float = 900
    """Nothing is offered that would have to be answered sooner."""
    offers_from: str = Field(default="09:00", pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")
    """By the clinic's clock; before it nothing is offered, since nobody may be written to."""
    offers_until: str = Field(default="19:00", pattern="^([01][0-9]|2[0-3]):[0-5][0-9]$")
    """After it nothing is offered on that day; the same as `offers_from` for day and night."""
    clearing_settle: float = 10
    """So long after days were closed one looks for visits that were booked at the same moment."""
    clearing_offer: float = 2 * 86400
    """How long another time is held for a visit that must move."""
    video_provider: Literal["none", "daily", "development"] = "none"
    """Who makes rooms for video visits; `development` makes links that lead nowhere, and is refused in production."""
    video_url: str = "https://api.daily.co/v1"
    video_key: str = Field(default="", repr=False)
    video_timeout: float = 5
    """For one call of the provider."""
    video_lease: float = 60
    """So long a room is in one replica's hands; longer than two calls of the provider."""

    @model_validator(mode="after")
    def _real_rooms(self) -> Self:
        if self.video_provider == "development" and self.environment == "production":
            raise ValueError("CARE_VIDEO_PROVIDER=development makes up links: not in production")
        if self.video_provider == "daily" and not self.video_key:
            raise ValueError("CARE_VIDEO_PROVIDER=daily needs CARE_VIDEO_KEY")
        return self
