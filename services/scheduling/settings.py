"""What a deployment may set about booking."""

from pydantic import Field

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
