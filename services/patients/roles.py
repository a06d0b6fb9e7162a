"""The roles that a tenant is shipped with; which permissions they bring is the tenant's to change."""

_READ = {
    "self.read", "patients.read", "timeline.read", "consents.read", "contacts.read", "staff.read", "pools.read",
    "tasks.read", "directory.read", "availability.search", "appointments.read", "referrals.read", "reminders.read",
    "messages.read", "questionnaires.read", "surveys.read", "requests.read", "waitlist.read",
}  # fmt: skip
_WORK = _READ | {"patients.match", "contacts.write", "tasks.write", "consents.write", "patients.write", "requests.ask"}
_BOOK = {
    "appointments.book",
    "appointments.write",
    "requests.work",
    "waitlist.answer",
    "waitlist.write",
    "sessions.write",
}
_SELF = {
    "self.read", "patients.read", "appointments.read", "availability.search", "timeline.read", "appointments.book",
    "appointments.write", "requests.read", "requests.ask", "waitlist.read", "waitlist.answer",
}  # fmt: skip
_JOIN = {"appointments.join"}
_DESK = {"appointments.check_in", "appointments.late_arrival"}
# Everybody who sees visits may follow them; by name, who may see what they are for.
_FEEDS = {"feeds.write", "feeds.details"}
_READ |= {"feeds.write"}
_WORK |= _FEEDS
_SELF |= _FEEDS

SHIPPED: dict[str, frozenset[str]] = {
    name: frozenset(permissions)
    for name, permissions in {
        "coordinator": _WORK
        | _BOOK
        | {
            *_DESK, *_JOIN, "tasks.assign", "referrals.write", "referrals.triage", "patients.break_glass",
            "appointments.clear",
        },
        "scheduler": _WORK | _BOOK | {"appointments.overbook", "appointments.held_back", *_DESK},
        "front_desk": _WORK | _BOOK | _DESK,
        "nurse": _WORK | _BOOK | {*_DESK, *_JOIN, "patients.break_glass", "referrals.write"},
        "clinician": _WORK
        | {*_DESK, *_JOIN, "patients.break_glass", "referrals.write", "referrals.acknowledge"},
        "manager": _WORK
        | _BOOK
        | {
            *_DESK, "appointments.void", "appointments.overbook", "appointments.clear", "appointments.held_back",
            "tasks.assign", "directory.write", "pools.write", "referrals.write", "referrals.triage", "accesses.read", "measures.read",
        },
        "quality": _READ | {"questionnaires.write", "measures.read"},
        "privacy_officer": _READ | {"accesses.read", "patients.break_glass", "tasks.write"},
        "integration_client": {
            "self.read", "patients.import", "directory.import", "directory.read", "directory.write", "consents.write",
            "patients.read", "patients.write", "appointments.import",
        },
        "external_partner": {"self.read", "referrals.read", "referrals.write"},
        "admin": {
            "self.read", "staff.read", "staff.write", "pools.read", "pools.write", "roles.write", "directory.read",
            "directory.write", "directory.import", "patients.import", "questionnaires.read", "questionnaires.write",
            "appointments.import",
        },
        "patient": _SELF | _JOIN,
        "proxy": _SELF | _JOIN,
    }.items()
}  # fmt: skip

PERMISSIONS = frozenset().union(*SHIPPED.values())
"""Every permission there is; a test holds it against the protos."""
