"""The loop that follows video visits and has rooms made and closed, outside of any transaction."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select, update

from chassis.timers import due
from services.scheduling.appointment import Appointment
from services.scheduling.providers_video import RoomRefused, VideoProvider, provider
from services.scheduling.video import RoomState, VideoRoom, wants_room

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

_AT_ONCE = 20
_ACTOR = "system:scheduling"


async def keep_rooms(runtime: "Runtime") -> int:
    """Follow the visits that changed, then ask the provider for what is due; answers how many things that were."""
    followed = await _follow(runtime)
    chosen = provider(runtime.settings)  # type: ignore[arg-type]
    if chosen is None:
        return followed
    rooms = await _claim(runtime)
    if rooms:
        async with chosen:
            outcomes = await asyncio.gather(*(_ask(chosen, room) for room in rooms))
        await _record(runtime, rooms, outcomes)
    return followed + len(rooms)


async def _follow(runtime: "Runtime") -> int:
    """Rooms for the times that visits have now; those of other times end. The visit's version stays: nothing of it changed."""
    async with runtime.database.acting(_ACTOR) as db:
        visits = await due(db, Appointment, Appointment.update_time, Appointment.video_stale, limit=_AT_ONCE)
        if not visits:
            return 0
        now, ids, tenants = db.info["act"].now, [one.id for one in visits], list({one.tenant_id for one in visits})
        standing = select(VideoRoom).where(
            VideoRoom.tenant_id.in_(tenants),
            VideoRoom.appointment_id.in_(ids),
            VideoRoom.state.in_([RoomState.WANTED, RoomState.READY]),
        )
        rooms = (await db.execute(standing.order_by(VideoRoom.id).with_for_update())).scalars().all()
        for visit in visits:
            mine = [one for one in rooms if one.appointment_id == visit.id]
            fits = [one for one in mine if wants_room(visit) and one.schedule_version == visit.schedule_version]
            for room in mine:
                if room not in fits:
                    room.end(now)
            if wants_room(visit) and not fits:
                db.add(VideoRoom.for_visit(visit, now))
        table = Appointment.__table__
        await db.execute(
            update(table)  # type: ignore[arg-type]
            .where(table.c.tenant_id.in_(tenants), table.c.id.in_(ids))
            .values(video_stale=False)
        )
    return len(visits)


async def _claim(runtime: "Runtime") -> Sequence[VideoRoom]:
    """Rooms about which the provider is asked now; committed before the first call."""
    lease = timedelta(seconds=runtime.settings.video_lease)  # type: ignore[attr-defined]
    async with runtime.database.acting(_ACTOR) as db:
        rooms = await due(db, VideoRoom, VideoRoom.next_time, limit=_AT_ONCE)
        for room in rooms:
            room.claim(db.info["act"].now, lease)
    return rooms


async def _ask(chosen: VideoProvider, room: VideoRoom) -> tuple[str, str]:
    """(address, code of what went wrong)."""
    try:
        if room.state is RoomState.ENDING:
            await chosen.end(room.name)
            return "", ""
        return await chosen.create(room.name, room.open_time, room.close_time), ""
    except RoomRefused as refused:
        return "", str(refused.args[0])


async def _record(runtime: "Runtime", asked: Sequence[VideoRoom], outcomes: Sequence[tuple[str, str]]) -> None:
    """Write down what came of it, where it still counts: a visit may have been cancelled meanwhile."""
    tokens = {room.lease_token: outcome for room, outcome in zip(asked, outcomes, strict=True)}
    async with runtime.database.acting(_ACTOR) as db:
        mine = select(VideoRoom).where(
            VideoRoom.tenant_id.in_({room.tenant_id for room in asked}),
            VideoRoom.id.in_([room.id for room in asked]),
            VideoRoom.lease_token.in_(list(tokens)),
        )
        for room in (await db.execute(mine.order_by(VideoRoom.id).with_for_update())).scalars():
            url, error = tokens[room.lease_token]
            if error:
                room.again(db.info["act"].now, error)
            elif room.state is RoomState.ENDING:
                room.closed()
            else:
                room.opened(url)
