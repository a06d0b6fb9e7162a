"""The send loop: what is due is checked once more against the other services and handed to a provider, never twice."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar

from care.feedback.v1 import feedback_pb2
from care.feedback.v1.feedback_pb2_grpc import SurveyInvitationsServiceStub
from care.patients.v1 import patients_pb2
from care.patients.v1.patients_pb2_grpc import PatientsServiceStub
from care.scheduling.v1 import appointments_pb2, waitlist_pb2
from care.scheduling.v1.appointments_pb2_grpc import AppointmentsServiceStub
from care.scheduling.v1.waitlist_pb2_grpc import WaitlistServiceStub
from care.type.v1 import type_pb2
from opentelemetry.trace import SpanKind, Status, StatusCode
from prometheus_client import Counter, Gauge, Histogram
from sqlalchemy import ColumnElement, any_, bindparam, func, or_, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import noload

from chassis.clients import call
from chassis.errors import NotFound, Problem
from chassis.ids import new_id
from chassis.model import Act, Id, Ids
from chassis.pipeline import Runtime
from chassis.telemetry import context_from, links_to
from chassis.timers import Loop, RunningLoop, due
from chassis.wire import to_time
from services.notifications.checking import Drop, Go, Known, Recipient, Visit, Wait, decide
from services.notifications.message import (
    BY_LINK,
    REMINDER,
    SURVEY,
    WAITING,
    Message,
    MessageStatus,
    Reminder,
    ReminderStatus,
)
from services.notifications.providers import Outcome, Parcel, Provider, providers
from services.notifications.settings import NotificationsSettings
from services.notifications.templates import Rendered, Templates, facts, local_time

_SAID_IN = "appointment-reminder"
"""The purpose by which consent to all messages about a visit is asked for."""
_REDACTED = "[link]"
_BACKLOG_EVERY = 10.0
_LOST_AT_ONCE = 100
_LOST_EVERY = 1.0  # seconds from one look for leases that ended to the next
_PACE = 0.02  # seconds from one claim to the next: what falls due meanwhile goes in one batch
_TRIES_TO_RECORD = 4
# Of the age that a check may reach: the rest is for the commit that says that the call begins.
_BEGUN_WITHIN = 0.6


# Text: at each claim, and through the ORM two thirds of what it costs.
_CLINICS = text(
    "SELECT id, name, discreet_name, time_zone, address, phone, directions, security_labels FROM clinic"
    " WHERE tenant_id = ANY(:tenants) AND id = ANY(:ids)"
).bindparams(bindparam("tenants", type_=Ids), bindparam("ids", type_=Ids)).columns(id=Id, address=JSONB)  # fmt: skip
_KINDS = text(
    "SELECT id, name, discreet_name, modality, preparation, security_labels FROM visit_type AS kind"
    " WHERE tenant_id = ANY(:tenants) AND EXISTS (SELECT FROM appointment AS visit WHERE visit.tenant_id = kind.tenant_id"
    " AND visit.id = ANY(:visits) AND visit.visit_type_id = kind.id)"
).bindparams(bindparam("tenants", type_=Ids), bindparam("visits", type_=Ids)).columns(id=Id, preparation=JSONB)  # fmt: skip


def _named(messages: Sequence[Message]) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """These messages. As arrays: a list of pairs would be rendered anew for each number of them."""
    tenants, ids = list({each.tenant_id for each in messages}), [each.id for each in messages]
    return (
        Message.tenant_id == any_(bindparam(None, tenants, type_=Ids)),
        Message.id == any_(bindparam(None, ids, type_=Ids)),
    )


class SendMetrics:
    """What the loop shows at /metrics."""

    def __init__(self, registry: Any) -> None:
        labels = ("channel",)
        self.messages = Counter(
            "care_messages", "Messages by what became of them.", ("channel", "outcome"), registry=registry
        )
        self.lateness = Histogram(
            "care_reminder_lateness_seconds",
            "From the time at which a message should leave to the provider's call.",
            ("purpose", "channel"),
            buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600),
            registry=registry,
        )
        self.check_age = Histogram(
            "care_message_check_age_seconds",
            "From before the last check's read was sent to the provider's call; 1 s at the most.",
            labels,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1),
            registry=registry,
        )
        self.call = Histogram(
            "care_provider_call_duration_seconds",
            "Duration of calls of providers.",
            ("channel", "outcome"),
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=registry,
        )
        self.overtaken = Counter(
            "care_messages_overtaken",
            "Messages whose call began in the second after a cancel or move was committed.",
            labels,
            registry=registry,
        )
        self.fenced = Counter(
            "care_messages_fenced", "Outcomes that came after the lease had ended.", registry=registry
        )
        self.backlog = Gauge("care_message_backlog", "Messages and reminders that are due.", registry=registry)
        self.oldest = Gauge(
            "care_message_oldest_due_seconds", "How long the oldest of them has been due.", registry=registry
        )


class Budget:
    """Calls that a provider may be given, a second's worth at the most at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._most = max(1.0, rate)
        self._left, self._at = self._most, time.monotonic()

    def left(self) -> int:
        """Whole calls that may begin now."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        return int(self._left)

    def take(self, count: int) -> None:
        """Reserve calls; a negative count gives back what was not used."""
        self._left -= count


Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Together(Generic[Item, Answer]):
    """Joins what is asked for while one transaction is under way into the next: many commits become few, none waits idly."""

    def __init__(self, work: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]], most: int = 50) -> None:
        self._work, self._most = work, most
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Answer:
        """The result of one item. Raises what the work raised."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="together")
        return await future

    async def _run(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            if not await self._try(group, alone=len(group) == 1):
                for each in group:  # one of them may be what failed: it must not take the others along
                    await self._try([each], alone=True)

    async def _try(self, group: Sequence[tuple[Item, "asyncio.Future[Answer]"]], *, alone: bool) -> bool:
        try:
            results = await self._work([item for item, _ in group])
        except Exception as error:
            if alone and not group[0][1].done():
                group[0][1].set_exception(error)
            return False
        for (_, future), result in zip(group, results, strict=True):
            if not future.done():
                future.set_result(result)
        return True


class Start(NamedTuple):
    """A call begins: through which channel, with which text and by which consent."""

    channel: str
    values: Mapping[str, Any]


class Offer(NamedTuple):
    """What a message about an offered slot says; without a token the offer is no longer open."""

    token: str
    start_time: datetime
    expire_time: datetime


class Again(NamedTuple):
    """The check has become too old: it is made anew at once."""


class Ruling(NamedTuple):
    """What becomes of a message that waits and is ours."""

    message: Message
    batch: "Batch"
    verdict: Start | Wait | Drop | Again


class Result(NamedTuple):
    """What came of a call."""

    message: Message
    lease_token: str
    number: int
    outcome: Outcome


@dataclass
class Batch:
    """Messages of one tenant under one lease, and what is known about all of them."""

    tenant_id: str
    token: str
    messages: list[Message]
    clinics: Mapping[str, Any]
    """By id: rows with what `Clinic` has."""
    visit_types: Mapping[str, Any]
    claimed_time: datetime
    claimed_at: float

    def now(self) -> datetime:
        """The database's clock, carried on by the monotonic one."""
        return self.claimed_time + timedelta(seconds=time.monotonic() - self.claimed_at)


class SendLoop(Loop):
    """Starts the one sender of a service."""

    def __init__(self, name: str) -> None:
        super().__init__(name, _nothing)

    def start(self, runtime: Runtime) -> "RunningSender":
        """Begin to send."""
        return RunningSender(self.name, Sender(runtime), runtime)


async def _nothing(_runtime: Runtime) -> int:
    return 0


class RunningSender(RunningLoop):
    """A sender at work; stopping lets the calls under way end."""

    def more(self, done: int) -> bool:
        return self._sender.left_more

    def __init__(self, name: str, sender: "Sender", runtime: Runtime) -> None:
        self._sender = sender
        self.metrics = sender.metrics
        super().__init__(name, sender.work, sender.settings.send_every, runtime)

    async def stop(self, timeout: float = 8.0) -> None:
        until = time.monotonic() + timeout
        await super().stop(timeout)
        await self._sender.close(max(0.1, until - time.monotonic()))


class Sender:
    """Claims, checks, hands over, records. Several may work on one database."""

    def __init__(self, runtime: Runtime) -> None:
        assert isinstance(runtime.settings, NotificationsSettings)
        self.runtime = runtime
        self.settings = runtime.settings
        self.metrics = SendMetrics(runtime.telemetry.registry)
        self._actor = f"system:{runtime.service}"
        self._log = runtime.telemetry.log
        self._templates = Templates()
        self._providers: dict[str, Provider] = providers(self.settings)
        rates = {"SMS": self.settings.sms_rate, "EMAIL": self.settings.email_rate}
        self._budgets = {channel: Budget(rates[channel]) for channel in self._providers}
        self._slots = asyncio.Semaphore(self.settings.provider_connections)
        self._lanes: set[asyncio.Task[None]] = set()
        self._lease = timedelta(seconds=self.settings.send_lease)
        self._backlog_at = self._lost_at = float("-inf")
        self._size = self.settings.send_batch
        self._claimed_at = float("-inf")
        self.left_more = True
        """Whether the last claim took as much as it was allowed to."""
        self._rule = Together(self._apply)
        self._result = Together(self._record)

    # -- the round -----------------------------------------------------------------------------------------------------

    async def work(self, _runtime: Runtime) -> int:
        """Claim one batch and let it go its way; answers how many messages were touched."""
        await self._show_backlog()
        # Where even small batches grow stale before their end, side by side they only do so the more.
        lanes = self.settings.send_lanes if 2 * self._size > self.settings.send_batch else 1
        if len(self._lanes) >= lanes:
            await asyncio.wait(self._lanes, return_when=asyncio.FIRST_COMPLETED)
        count = min([self._size, *(budget.left() for budget in self._budgets.values())])
        if count < 1:
            await asyncio.sleep(_PACE)
            self.left_more = True
            return 0
        await asyncio.sleep(self._claimed_at + _PACE - time.monotonic())
        self._claimed_at = time.monotonic()
        batches, touched = await self._claim(count)
        for batch in batches:
            # Whichever channel they will take: what isn't used is given back.
            for budget in self._budgets.values():
                budget.take(len(batch.messages))
            lane = asyncio.create_task(self._run(batch), name="send batch")
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)
        return touched

    async def close(self, timeout: float) -> None:
        """Let calls under way end within `timeout`; those cut off are found as unknown when their lease ends."""
        lanes = set(self._lanes)
        if lanes:
            _, late = await asyncio.wait(lanes, timeout=timeout)
            for lane in late:
                lane.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for provider in self._providers.values():
            with contextlib.suppress(Exception):
                await provider.close()

    async def _run(self, batch: Batch) -> None:
        used: dict[str, int] = dict.fromkeys(self._budgets, 0)
        try:
            await self._send(batch, used)
        except Exception as error:  # the lease ends by itself
            self._log.warning("messages wait, trying again", messages=len(batch.messages), exc_info=error)
        finally:
            for channel, budget in self._budgets.items():
                budget.take(used[channel] - len(batch.messages))

    # -- claim ---------------------------------------------------------------------------------------------------------

    async def _claim(self, count: int) -> tuple[list[Batch], int]:
        """What is due, under a lease: waiting messages first, then reminders, which become messages."""
        token = new_id()
        async with self.runtime.database.acting(self._actor) as db:
            now, at = db.info["act"].now, time.monotonic()
            lost: list[Message] = []
            if at - self._lost_at > _LOST_EVERY:
                self._lost_at = at
                called = Message.status == MessageStatus.IN_PROGRESS
                lost = await due(db, Message, Message.lease_time, called, limit=_LOST_AT_ONCE)
                if len(lost) == _LOST_AT_ONCE:
                    self._lost_at = float("-inf")
            for message in lost:
                # Its call may have been made: nobody knows, so nobody repeats it.
                message.lose(now, "lease-expired")
                self._count(message, "unknown")
            waiting = await due(
                db,
                Message,
                Message.next_time,
                Message.status.in_(WAITING),
                or_(Message.lease_time.is_(None), Message.lease_time < func.clock_timestamp()),
                limit=count,
            )
            reminders: list[Reminder] = []
            made: list[Message] = []
            if len(waiting) < count:
                active = Reminder.status == ReminderStatus.ACTIVE
                reminders = await due(db, Reminder, Reminder.due_time, active, limit=count - len(waiting))
                made = [reminder.make(new_id()) for reminder in self._still_of_use(reminders)]
                db.add_all(made)
            messages = [*waiting, *made]
            self.left_more = len(waiting) + len(reminders) >= count
            claimed = []
            for message in messages:
                if message.expire_time <= now:
                    message.suppress("too-late")
                    self._count(message, "suppressed")
                else:
                    message.lease(token, now + self._lease)
                    claimed.append(message)
            clinics, visit_types = await self._directory(db, claimed)
        touched = len(lost) + len(messages) + len(reminders)
        tenants: dict[str, list[Message]] = {}
        for message in claimed:
            tenants.setdefault(message.tenant_id, []).append(message)
        return [Batch(tenant, token, rows, clinics, visit_types, now, at) for tenant, rows in tenants.items()], touched

    @staticmethod
    def _still_of_use(reminders: Sequence[Reminder]) -> list[Reminder]:
        """After an outage only the last of a visit's missed reminders is caught up."""
        last: dict[str, Reminder] = {}
        for reminder in sorted(reminders, key=lambda each: each.due_time):
            if reminder.kind == REMINDER:
                last[reminder.appointment_id] = reminder
        kept = []
        for reminder in reminders:
            if reminder.kind == REMINDER and last[reminder.appointment_id] is not reminder:
                reminder.revoke("missed")
            else:
                kept.append(reminder)
        return kept

    async def _directory(self, db: AsyncSession, messages: Sequence[Message]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is known here about the places and kinds of the visits; read now, since after the check every step counts."""
        tenants = list({message.tenant_id for message in messages})
        ids = list({message.clinic_id for message in messages if message.clinic_id})
        visits = list({message.about_id for message in messages if message.about["type"] == "Appointment"})
        clinics = await db.execute(_CLINICS, {"tenants": tenants, "ids": ids}) if ids else ()
        kinds = await db.execute(_KINDS, {"tenants": tenants, "visits": visits}) if visits else ()
        return {row.id: row for row in clinics}, {row.id: row for row in kinds}

    # -- check ---------------------------------------------------------------------------------------------------------

    async def _send(self, batch: Batch, used: dict[str, int]) -> None:
        links = [link for message in batch.messages for link in links_to(message.traceparent)]
        with self.runtime.telemetry.span("check messages", links=links, attributes={"care.count": len(batch.messages)}):
            # From here on the check ages.
            asked = time.monotonic()
            try:
                known = await self._read(batch)
            except Problem as problem:
                self._log.warning(
                    "a service is away, messages wait", reason=problem.reason, messages=len(batch.messages)
                )
                await asyncio.gather(
                    *(self._settle(batch, each, self._later(batch, each, "service-away")) for each in batch.messages)
                )
                return
            now = batch.now()
            verdicts = [(message, decide(message, known[message.id], now)) for message in batch.messages]
        stale = await asyncio.gather(
            *(
                self._deliver(batch, message, verdict, known[message.id].visit, asked, used)
                if isinstance(verdict, Go)
                else self._settle(batch, message, verdict)
                for message, verdict in verdicts
            )
        )
        # Batches that are too large for the moment grow stale before their end.
        self._size = max(1, self._size // 2) if any(stale) else min(self.settings.send_batch, self._size + 1)

    async def _read(self, batch: Batch) -> dict[str, Known]:
        """Whom to write to and what has become of the visits, side by side. Raises Problem where one doesn't answer."""
        recipients, visits = await asyncio.gather(self._recipients(batch), self._visits(batch))
        return {
            message.id: Known(
                recipients.get(message.id, {}), visits.get(message.about_id), self._zone_of(batch, message)
            )
            for message in batch.messages
        }

    @staticmethod
    def _zone_of(batch: Batch, message: Message) -> str:
        clinic = batch.clinics.get(message.clinic_id or "")
        return clinic.time_zone if clinic else ""

    async def _recipients(self, batch: Batch) -> dict[str, dict[str, Recipient]]:
        asked = [
            (message, channel)
            for message in batch.messages
            for channel in message.channels
            if channel in self._providers and channel not in message.spent
        ]
        found: dict[str, dict[str, Recipient]] = {}
        if not asked:
            return found
        request = patients_pb2.BatchGetRecipientsRequest(tenant_id=batch.tenant_id)
        for message, channel in asked:
            request.items.add(
                patient_id=message.patient_id,
                recipient=type_pb2.Reference(**message.recipient),
                channel=type_pb2.Channel.Code.Value(channel),
                purpose=message.purpose if message.purpose == SURVEY else _SAID_IN,
            )
        stub = PatientsServiceStub(self.runtime.clients.channel("patients"))
        answer = await self._ask(stub.BatchGetRecipients, request, batch.tenant_id)
        for (message, channel), one in zip(asked, answer.recipients, strict=True):
            found.setdefault(message.id, {})[channel] = Recipient(
                one.refusal,
                one.contact_value,
                tuple(one.languages),
                tuple(one.time_zones),
                one.given_name,
                one.consent_id,
                one.consent_version,
            )
        return found

    async def _visits(self, batch: Batch) -> dict[str, Visit]:
        ids = {message.about_id for message in batch.messages if message.about["type"] == "Appointment"}
        if not ids:
            return {}
        stub = AppointmentsServiceStub(self.runtime.clients.channel("scheduling"))
        request = appointments_pb2.BatchGetAppointmentsRequest(ids=sorted(ids))
        answer = await self._ask(stub.BatchGetAppointments, request, batch.tenant_id)
        return {
            one.id: Visit(
                appointments_pb2.Appointment.Status.Name(one.status),
                one.schedule_version,
                to_time(one.start_time),
                one.time_zone,
                one.clinic_id,
                one.visit_type_id,
            )
            for one in answer.appointments
        }

    async def _ask(self, rpc: Any, request: Any, tenant_id: str) -> Any:
        metadata = self.runtime.clients.own_metadata(tenant_id)
        return await call(rpc, request, metadata, timeout=self.settings.check_timeout)

    def _later(self, batch: Batch, message: Message, reason: str) -> Wait:
        """Soon again, and the less often the longer it takes."""
        now = batch.now()
        overdue = (now - message.due_time).total_seconds()
        return Wait(now + timedelta(seconds=max(self.settings.service_away_pause, min(60.0, overdue / 10))), reason)

    async def _settle(self, batch: Batch, message: Message, verdict: Wait | Drop | Again) -> bool:
        """Write down why it does not leave now; whether that is because the check had become too old."""
        await self._rule(Ruling(message, batch, verdict))
        return isinstance(verdict, Again)

    async def _apply(self, rulings: Sequence[Ruling]) -> list[int | None]:
        """Numbers of the calls that may begin. None for what stays, and for what is no longer ours or no longer waits:
        a change that was heard meanwhile, or another holder of the lease, has won."""
        now = max(each.batch.now() for each in rulings)
        async with self.runtime.database.writing() as db:
            # Neither the clock nor the attempts are asked for again: the check grows older with each step.
            db.info["act"] = Act(self._actor, now)
            found = await db.execute(
                select(Message)
                .where(*_named([each.message for each in rulings]), Message.status.in_(WAITING))
                .order_by(Message.id)
                .options(noload(Message.attempts))
                .with_for_update(of=Message, key_share=True)
            )
            rows = {(row.id, row.lease_token): row for row in found.scalars()}
            numbers = [
                self._ruled(db, rows.get((each.message.id, each.batch.token)), each.verdict, now) for each in rulings
            ]
            await db.commit()
        return numbers

    def _ruled(
        self, db: AsyncSession, row: Message | None, verdict: Start | Wait | Drop | Again, now: datetime
    ) -> int | None:
        if row is None:
            return None
        if isinstance(verdict, Start):
            attempt = row.start(now, now + self._lease, verdict.channel, **verdict.values)
            db.add(attempt)
            return attempt.number
        if isinstance(verdict, Again):
            row.free()
        elif isinstance(verdict, Wait):
            row.wait(verdict.until, verdict.reason)
            self._count(row, "held")
        else:
            row.suppress(verdict.reason)
            self._count(row, "failed" if row.status is MessageStatus.STOPPED else "suppressed")
        return None

    # -- hand over -----------------------------------------------------------------------------------------------------

    async def _deliver(
        self, batch: Batch, message: Message, go: Go, visit: Visit | None, asked: float, used: dict[str, int]
    ) -> bool:
        """Hand it over, or write down why not; whether that is because the check had become too old."""

        def fresh(share: float = 1.0) -> bool:
            return time.monotonic() - asked <= self.settings.check_age * share

        async with self._slots:
            token = ""
            offer: Offer | None = None
            if message.kind in BY_LINK:
                try:
                    if message.kind == SURVEY:
                        token = await self._survey_token(message)
                    else:
                        offer = await self._offer(message)
                        token = offer.token
                except NotFound:
                    token = ""
                except Problem:
                    return await self._settle(batch, message, self._later(batch, message, "service-away"))
                if not token:
                    return await self._settle(batch, message, Drop("closed"))
            rendered = self._text(batch, message, go, visit, token, offer)
            if rendered is None:
                return await self._settle(batch, message, self._later(batch, message, "clinic-unknown"))
            if not fresh(_BEGUN_WITHIN):
                return await self._settle(batch, message, Again())
            number = await self._rule(Ruling(message, batch, self._start(batch, message, go, rendered, token)))
            if number is None:
                return False
            used[go.channel] += 1
            outcome = await self._call(batch, message, go, rendered, number, asked, fresh)
        await self._keep(Result(message, batch.token, number, outcome))
        return outcome.kind == "stale"

    async def _survey_token(self, message: Message) -> str:
        stub = SurveyInvitationsServiceStub(self.runtime.clients.channel("feedback"))
        request = feedback_pb2.IssueSurveyLinkRequest(
            tenant_id=message.tenant_id,
            invitation_id=message.about_id,
            request_id=f"{message.id}:{message.calls}",
        )
        answer = await self._ask(stub.IssueSurveyLink, request, message.tenant_id)
        return str(answer.token)

    async def _offer(self, message: Message) -> "Offer":
        stub = WaitlistServiceStub(self.runtime.clients.channel("scheduling"))
        request = waitlist_pb2.IssueWaitlistOfferLinkRequest(
            tenant_id=message.tenant_id, offer_id=message.about_id, request_id=f"{message.id}:{message.calls}"
        )
        answer = await self._ask(stub.IssueWaitlistOfferLink, request, message.tenant_id)
        return Offer(answer.token, to_time(answer.start_time), to_time(answer.expire_time))

    def _text(
        self, batch: Batch, message: Message, go: Go, visit: Visit | None, token: str, offer: "Offer | None" = None
    ) -> Rendered | None:
        """The text, or None while the clinic isn't known here: without it nobody knows what must stay discreet."""
        clinic_id = visit.clinic_id if visit else message.clinic_id or ""
        clinic = batch.clinics.get(clinic_id)
        if clinic is None and clinic_id:
            return None
        visit_type = None
        if visit and visit.visit_type_id:
            visit_type = batch.visit_types.get(visit.visit_type_id)
            if visit_type is None:
                return None
        languages = list(go.recipient.languages)
        language = self._templates.language(message.kind, go.channel, languages)
        values = facts(
            channel=go.channel,
            language=language,
            given_name=go.recipient.given_name,
            labels=message.security_labels,
            clinic=clinic,
            visit_type=visit_type,
            start=visit.start_time if visit else offer.start_time if offer else None,
            until=offer.expire_time if offer else None,
            modality=visit_type.modality if visit_type else "",
            link=f"{self.settings.link_base_url.rstrip('/')}/p/{token}" if token else "",
        )
        return self._templates.render(message.kind, go.channel, languages, values)

    def _start(self, batch: Batch, message: Message, go: Go, rendered: Rendered, token: str) -> Start:
        return Start(
            go.channel,
            {
                "language": rendered.language,
                "wished_language": rendered.wished,
                "template": rendered.template,
                # The link is a key: it stands in the message that left and nowhere else.
                "text": rendered.text.replace(token, _REDACTED) if token else rendered.text,
                "consent_id": go.recipient.consent_id or None,
                "consent_version": go.recipient.consent_version,
                "local_time": local_time(batch.now(), go.recipient.time_zones, self._zone_of(batch, message)),
            },
        )

    async def _call(
        self,
        batch: Batch,
        message: Message,
        go: Go,
        rendered: Rendered,
        number: int,
        asked: float,
        fresh: Any,
    ) -> Outcome:
        channel = go.channel.lower()
        began: list[float] = []

        def may_begin() -> bool:
            if not fresh():
                return False
            began.append(time.monotonic())
            return True

        # What answers an event at once belongs to its trace; a reminder of days later begins its own and links to it.
        parent = context_from(message.traceparent) if message.kind != REMINDER else context_from(None)
        with self.runtime.telemetry.span(
            f"send {channel}",
            kind=SpanKind.CLIENT,
            parent=parent,
            links=links_to(message.traceparent),
            attributes={"care.channel": channel, "care.attempt": number},
        ) as span:
            started = time.monotonic()
            parcel = Parcel(message.id, go.recipient.contact_value, rendered.subject, rendered.text)
            try:
                outcome = await self._providers[go.channel].send(parcel, may_begin)
            except Exception as error:  # a defect of ours; what was sent, if anything, is not known
                outcome = Outcome("unknown", type(error).__name__)
            span.set_attribute("care.outcome", outcome.kind)
            if outcome.kind != "accepted":
                span.set_status(Status(StatusCode.ERROR))
                span.set_attribute("error.type", outcome.error_code or outcome.kind)
            self.metrics.call.labels(channel, outcome.kind).observe(time.monotonic() - started)
        if began:
            self.metrics.check_age.labels(channel).observe(began[0] - asked)
            since = batch.claimed_time + timedelta(seconds=began[0] - batch.claimed_at) - message.due_time
            self.metrics.lateness.labels(message.purpose, channel).observe(max(0.0, since.total_seconds()))
        return outcome

    async def _keep(self, result: Result) -> None:
        """Write down what came of a call. Where that can't be done the lease ends, and nobody knows."""
        for trial in range(_TRIES_TO_RECORD):
            try:
                await self._result(result)
                return
            except Exception as error:
                self._log.warning("outcome not recorded yet", error=type(error).__name__, outcome=result.outcome.kind)
                await asyncio.sleep(0.2 * 4**trial)

    async def _record(self, results: Sequence[Result]) -> list[None]:
        async with self.runtime.database.acting(self._actor) as db:
            now = db.info["act"].now
            found = await db.execute(
                select(Message)
                .where(*_named([each.message for each in results]))
                .order_by(Message.id)
                .with_for_update(of=Message, key_share=True)
            )
            rows = {row.id: row for row in found.scalars()}
            for each in results:
                self._write(rows[each.message.id], each, now)
        return [None] * len(results)

    def _write(self, row: Message, result: Result, now: datetime) -> None:
        settings, outcome = self.settings, result.outcome
        if row.lease_token != result.lease_token or row.status is not MessageStatus.IN_PROGRESS:
            self.metrics.fenced.inc()
            # Late, but certain: it was taken. Nothing else may follow from a lease that has ended.
            late = outcome.kind == "accepted" and row.status is MessageStatus.UNKNOWN
            if not late or row.calls != result.number:
                return
        if outcome.kind == "accepted":
            row.complete(now, outcome.provider_message_id)
        elif outcome.kind == "unknown":
            row.lose(now, outcome.error_code)
        elif outcome.kind == "stale":
            row.give_back(now)
        elif outcome.kind == "failed":
            pause = max(min(settings.retry_base * 2**row.tries, 300.0), outcome.retry_after)
            row.retry(now, outcome.error_code, timedelta(seconds=pause), settings.tries_at_most)
        else:
            row.refuse(now, outcome.error_code)
        self._count(row, _COUNTED.get(row.status, "retried"))

    # -- shown ---------------------------------------------------------------------------------------------------------

    def _count(self, message: Message, outcome: str) -> None:
        self.metrics.messages.labels(message.channel.lower(), outcome).inc()

    async def _show_backlog(self) -> None:
        if time.monotonic() - self._backlog_at < _BACKLOG_EVERY:
            return
        self._backlog_at = time.monotonic()
        clock = func.clock_timestamp()
        messages = select(func.count(), func.min(Message.next_time), clock).where(
            Message.status.in_(WAITING), Message.next_time <= clock
        )
        reminders = select(func.count(), func.min(Reminder.due_time), clock).where(
            Reminder.status == ReminderStatus.ACTIVE, Reminder.due_time <= clock
        )
        async with self.runtime.database.reading() as db:
            rows = [(await db.execute(query)).one() for query in (messages, reminders)]
        self.metrics.backlog.set(sum(row[0] for row in rows))
        self.metrics.oldest.set(max(((row[2] - row[1]).total_seconds() for row in rows if row[1]), default=0.0))


_COUNTED = {
    MessageStatus.COMPLETED: "sent",
    MessageStatus.UNKNOWN: "unknown",
    MessageStatus.STOPPED: "failed",
}
