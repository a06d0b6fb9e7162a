"""The notifications service, said in one place."""

from pathlib import Path

from care.notifications.v1 import events_pb2, notifications_pb2

from chassis.service import Service
from services.notifications.projections import Base
from services.notifications.reactions import SEND_LOOP, reactions
from services.notifications.sending import SendLoop
from services.notifications.servicer import MessagesServicer, RemindersServicer
from services.notifications.settings import NotificationsSettings

SERVICE = Service(
    name="notifications",
    base=Base,
    migrations=Path(__file__).parent / "migrations",
    servicers={
        notifications_pb2.DESCRIPTOR.services_by_name["RemindersService"]: RemindersServicer(),
        notifications_pb2.DESCRIPTOR.services_by_name["MessagesService"]: MessagesServicer(),
    },
    payloads={"message": events_pb2.MessageEvent},
    reactions=reactions,
    hears=("scheduling", "feedback"),
    loops=(SendLoop(SEND_LOOP),),
    settings=NotificationsSettings,
)
