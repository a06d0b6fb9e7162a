"""The referrals service, said in one place."""

from pathlib import Path

from care.referrals.v1 import events_pb2, referrals_pb2

from chassis import calendar
from chassis.errors import AlreadyExists
from chassis.service import Service
from chassis.timers import Loop
from services.referrals.reactions import OVERDUE, reactions, tell_overdue
from services.referrals.referral import Base
from services.referrals.servicer_referrals import ReferralsServicer

SERVICE = Service(
    name="referrals",
    base=Base,
    migrations=Path(__file__).parent / "migrations",
    servicers={referrals_pb2.DESCRIPTOR.services_by_name["ReferralsService"]: ReferralsServicer()},
    payloads={"referral": events_pb2.ReferralEvent},
    reactions=reactions,
    warm=(calendar.warm,),
    hears=("scheduling",),
    loops=(Loop(OVERDUE, tell_overdue, every=5.0),),
    reasons={
        "referral_identifier_key": (
            AlreadyExists,
            "IDENTIFIER_TAKEN",
            "An identifier belongs to another referral.",
        ),
    },
)
