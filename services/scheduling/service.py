"""The scheduling service, said in one place."""

from pathlib import Path

from care.scheduling.v1 import (
    appointments_pb2,
    availability_views_pb2,
    board_pb2,
    clearings_pb2,
    directory_pb2,
    events_pb2,
    feeds_pb2,
    hours_pb2,
    imports_pb2,
    live_pb2,
    measures_pb2,
    requests_pb2,
    series_pb2,
    sessions_pb2,
    stranded_pb2,
    video_pb2,
    waitlist_pb2,
)

from chassis import calendar
from chassis.errors import Aborted, AlreadyExists
from chassis.service import Service
from chassis.timers import Loop
from services.scheduling import asking
from services.scheduling.backfill import BackfillLoop
from services.scheduling.clearing_work import CLEARINGS, clear_days
from services.scheduling.directory import Base
from services.scheduling.expiry import expire_holds
from services.scheduling.nightly import EVERY_SECONDS as NIGHTLY_SECONDS
from services.scheduling.nightly import take_measures
from services.scheduling.reactions import OVERDUE, reactions, tell_overdue_requests
from services.scheduling.releasing import EVERY_SECONDS as RELEASES_SECONDS
from services.scheduling.releasing import notice_releases
from services.scheduling.sending_video import keep_rooms
from services.scheduling.servicer_appointments import AppointmentsServicer
from services.scheduling.servicer_availability import AvailabilityServicer, AvailabilityViewsServicer
from services.scheduling.servicer_board import DayBoardServicer
from services.scheduling.servicer_clearings import ClearingsServicer
from services.scheduling.servicer_directory import (
    ClinicsServicer,
    PractitionersServicer,
    ResourcesServicer,
    SchedulesServicer,
    VisitTypesServicer,
)
from services.scheduling.servicer_feeds import CalendarFeedsServicer, CalendarLinksServicer
from services.scheduling.servicer_hours import HoursServicer
from services.scheduling.servicer_imports import AppointmentImportsServicer
from services.scheduling.servicer_live import ScheduleLiveServicer
from services.scheduling.servicer_measures import MeasuresServicer
from services.scheduling.servicer_requests import SchedulingPreferencesServicer, SchedulingRequestsServicer
from services.scheduling.servicer_series import SeriesServicer
from services.scheduling.servicer_sessions import SessionsServicer
from services.scheduling.servicer_stranded import StrandedAppointmentsServicer
from services.scheduling.servicer_video import VideoRoomsServicer
from services.scheduling.servicer_waitlist import WaitlistLinksServicer, WaitlistServicer
from services.scheduling.settings import SchedulingSettings
from services.scheduling.snapshot import Directories
from services.scheduling.tidying import CHANGES_EVERY_SECONDS, EVERY_SECONDS, delete_old_occupancy, forget_changes

_directories = Directories()

SERVICE = Service(
    name="scheduling",
    base=Base,
    migrations=Path(__file__).parent / "migrations",
    servicers={
        directory_pb2.DESCRIPTOR.services_by_name["ClinicsService"]: ClinicsServicer(),
        directory_pb2.DESCRIPTOR.services_by_name["PractitionersService"]: PractitionersServicer(),
        directory_pb2.DESCRIPTOR.services_by_name["ResourcesService"]: ResourcesServicer(),
        directory_pb2.DESCRIPTOR.services_by_name["VisitTypesService"]: VisitTypesServicer(),
        directory_pb2.DESCRIPTOR.services_by_name["SchedulesService"]: SchedulesServicer(),
        appointments_pb2.DESCRIPTOR.services_by_name["AvailabilityService"]: AvailabilityServicer(_directories),
        availability_views_pb2.DESCRIPTOR.services_by_name["AvailabilityViewsService"]: AvailabilityViewsServicer(
            _directories
        ),
        appointments_pb2.DESCRIPTOR.services_by_name["AppointmentsService"]: AppointmentsServicer(),
        hours_pb2.DESCRIPTOR.services_by_name["HoursService"]: HoursServicer(),
        imports_pb2.DESCRIPTOR.services_by_name["AppointmentImportsService"]: AppointmentImportsServicer(),
        board_pb2.DESCRIPTOR.services_by_name["DayBoardService"]: DayBoardServicer(),
        clearings_pb2.DESCRIPTOR.services_by_name["ClearingsService"]: ClearingsServicer(),
        video_pb2.DESCRIPTOR.services_by_name["VideoRoomsService"]: VideoRoomsServicer(),
        requests_pb2.DESCRIPTOR.services_by_name["SchedulingRequestsService"]: SchedulingRequestsServicer(),
        requests_pb2.DESCRIPTOR.services_by_name["SchedulingPreferencesService"]: SchedulingPreferencesServicer(),
        series_pb2.DESCRIPTOR.services_by_name["SeriesService"]: SeriesServicer(),
        sessions_pb2.DESCRIPTOR.services_by_name["SessionsService"]: SessionsServicer(),
        live_pb2.DESCRIPTOR.services_by_name["ScheduleLiveService"]: ScheduleLiveServicer(),
        waitlist_pb2.DESCRIPTOR.services_by_name["WaitlistService"]: WaitlistServicer(),
        waitlist_pb2.DESCRIPTOR.services_by_name["WaitlistLinksService"]: WaitlistLinksServicer(),
        feeds_pb2.DESCRIPTOR.services_by_name["CalendarFeedsService"]: CalendarFeedsServicer(),
        feeds_pb2.DESCRIPTOR.services_by_name["CalendarLinksService"]: CalendarLinksServicer(),
        stranded_pb2.DESCRIPTOR.services_by_name["StrandedAppointmentsService"]: StrandedAppointmentsServicer(),
        measures_pb2.DESCRIPTOR.services_by_name["MeasuresService"]: MeasuresServicer(),
    },
    payloads={
        "clinic": directory_pb2.Clinic,
        "practitioner": directory_pb2.Practitioner,
        "resource": directory_pb2.Resource,
        "visit_type": directory_pb2.VisitType,
        "schedule": directory_pb2.Schedule,
        "appointment": events_pb2.AppointmentEvent,
        "hold": events_pb2.AppointmentEvent,
        "clearing": clearings_pb2.ClearingEvent,
        "clearing_visit": clearings_pb2.ClearingVisitEvent,
        "measure": measures_pb2.Measure,
        "scheduling_request": requests_pb2.SchedulingRequestEvent,
        "series": series_pb2.SeriesEvent,
        "session": sessions_pb2.SessionEvent,
        "waitlist": waitlist_pb2.WaitlistEvent,
    },
    reactions=reactions,
    asks={
        "facts": asking.facts,
        "patient_by_identifier": asking.patient_by_identifier,
        "heard_of": asking.heard_of,
    },
    hears=("referrals",),
    warm=(calendar.warm,),
    loops=(
        Loop("hold expiry", expire_holds, every=1.0),
        Loop(CLEARINGS, clear_days, every=2.0),
        Loop(OVERDUE, tell_overdue_requests, every=5.0),
        BackfillLoop(),
        Loop("measures", take_measures, every=NIGHTLY_SECONDS),
        Loop("releases", notice_releases, every=RELEASES_SECONDS),
        Loop("video rooms", keep_rooms, every=1.0),
        Loop("old occupancy", delete_old_occupancy, every=EVERY_SECONDS),
        Loop("old changes", forget_changes, every=CHANGES_EVERY_SECONDS),
    ),
    settings=SchedulingSettings,
    reasons={
        "appointment_seat_key": (AlreadyExists, "SESSION_FULL", "No place is left in this session."),
        "occupancy_taken": (AlreadyExists, "SLOT_TAKEN", "This time is taken; search for another one."),
        "waitlist_entry_open_key": (
            AlreadyExists,
            "WAITLIST_ENTRY_EXISTS",
            "The patient waits for this visit type already; change that entry.",
        ),
        "directory_identifier_key": (
            AlreadyExists,
            "IDENTIFIER_TAKEN",
            "An identifier belongs to another entry of the directory.",
        ),
        "visit_type_code_key": (AlreadyExists, "CODE_TAKEN", "A visit type with this code exists."),
        "scheduling_request_referral_key": (
            AlreadyExists,
            "REQUEST_EXISTS",
            "There is a request for a visit on this referral.",
        ),
        "scheduling_preferences_pkey": (
            Aborted,
            "PREFERENCES_CHANGED",
            "Somebody else has just set them; read them again.",
        ),
        "schedule_practitioner_key": (
            AlreadyExists,
            "SCHEDULE_EXISTS",
            "There are hours of this practitioner at this clinic; change those.",
        ),
    },
)
