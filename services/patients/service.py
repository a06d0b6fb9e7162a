"""The patients service, said in one place."""

from pathlib import Path

from care.access.v1 import access_pb2
from care.patients.v1 import consents_pb2, events_pb2, facts_pb2, patients_pb2, staff_pb2, tasks_pb2, timeline_pb2

from chassis import calendar
from chassis.errors import AlreadyExists
from chassis.service import Service
from chassis.timers import Loop
from services.patients.patient import Base
from services.patients.reactions import reactions
from services.patients.servicer_access import AccessServicer, beat
from services.patients.servicer_consents import ConsentsServicer
from services.patients.servicer_facts import FactsServicer
from services.patients.servicer_patients import PatientsServicer
from services.patients.servicer_staff import PoolsServicer, RolesServicer, StaffServicer
from services.patients.servicer_tasks import TasksServicer
from services.patients.servicer_timeline import ContactsServicer, TimelineServicer

SERVICE = Service(
    name="patients",
    base=Base,
    migrations=Path(__file__).parent / "migrations",
    owns_access=True,
    servicers={
        access_pb2.DESCRIPTOR.services_by_name["AccessService"]: AccessServicer(),
        patients_pb2.DESCRIPTOR.services_by_name["PatientsService"]: PatientsServicer(),
        facts_pb2.DESCRIPTOR.services_by_name["FactsService"]: FactsServicer(),
        staff_pb2.DESCRIPTOR.services_by_name["StaffService"]: StaffServicer(),
        staff_pb2.DESCRIPTOR.services_by_name["PoolsService"]: PoolsServicer(),
        staff_pb2.DESCRIPTOR.services_by_name["RolesService"]: RolesServicer(),
        consents_pb2.DESCRIPTOR.services_by_name["ConsentsService"]: ConsentsServicer(),
        timeline_pb2.DESCRIPTOR.services_by_name["TimelineService"]: TimelineServicer(),
        timeline_pb2.DESCRIPTOR.services_by_name["ContactsService"]: ContactsServicer(),
        tasks_pb2.DESCRIPTOR.services_by_name["TasksService"]: TasksServicer(),
    },
    payloads={
        "patient": events_pb2.PatientEvent,
        "patient.access_changed": access_pb2.SubjectAccess,
        "staff": access_pb2.PrincipalState,
        "login": access_pb2.PrincipalState,
        "role": access_pb2.RoleState,
        "pool": events_pb2.PoolState,
        "consent": events_pb2.ConsentEvent,
        "contact": events_pb2.ContactEvent,
        "task": events_pb2.TaskEvent,
    },
    reactions=reactions,
    warm=(calendar.warm,),
    # Its own topic too: the timeline has one way in for all services' events.
    hears=("scheduling", "referrals", "notifications", "feedback", "patients"),
    loops=(Loop("heartbeat", beat, every=lambda settings: settings.heartbeat_interval),),
    reasons={
        "staff_login_key": (AlreadyExists, "LOGIN_TAKEN", "This issuer's subject belongs to somebody else."),
        "login_key": (AlreadyExists, "LOGIN_TAKEN", "This issuer's subject belongs to somebody else."),
        "principal_pkey": (AlreadyExists, "LOGIN_TAKEN", "This issuer's subject belongs to somebody else."),
        "pool_name_key": (AlreadyExists, "NAME_TAKEN", "A pool of this name exists."),
    },
)
