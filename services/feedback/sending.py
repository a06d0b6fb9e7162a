"""The loop that sends surveys on their way and ends those that nobody answered."""

from chassis.pipeline import Runtime
from chassis.timers import due
from services.feedback.invitation import Status, SurveyInvitation

LOOP = "surveys"


async def send_due(runtime: Runtime) -> int:
    """Invite where the delay is over, expire where the time to answer is."""
    async with runtime.database.acting("system:feedback") as db:
        now = db.info["act"].now
        ready = await due(db, SurveyInvitation, SurveyInvitation.due_time, SurveyInvitation.status == Status.PLANNED)
        for invitation in ready:
            runtime.loop_metrics.lateness.labels(LOOP).observe((now - invitation.due_time).total_seconds())
            invitation.invite()
        ended = await due(db, SurveyInvitation, SurveyInvitation.expire_time, SurveyInvitation.status == Status.INVITED)
        for invitation in ended:
            invitation.expire()
    return len(ready) + len(ended)
