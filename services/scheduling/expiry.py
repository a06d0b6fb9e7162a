"""The loop that ends holds whose time is over, where nobody has taken them over before."""

from typing import TYPE_CHECKING

from chassis.timers import due
from services.scheduling import occupancy
from services.scheduling.appointment import Appointment, Status

if TYPE_CHECKING:
    from chassis.pipeline import Runtime


async def expire_holds(runtime: "Runtime") -> int:
    """End what is due and give its time back; answers how many holds that were."""
    async with runtime.database.acting("system:scheduling") as db:
        held = await due(db, Appointment, Appointment.hold_expire_time, Appointment.status == Status.PENDING)
        for appointment in held:
            appointment.expire()
        if held:
            await occupancy.free(db, *((one.tenant_id, one.id) for one in held))
    return len(held)
