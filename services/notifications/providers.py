"""The providers: e-mail by SMTP, texts by HTTP. Each call ends in one of few outcomes, never in the provider's own words."""

import re
import time
from collections.abc import Callable
from email.errors import MessageError
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import formatdate, parseaddr
from typing import Any, Literal, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import httpx2
from aiosmtplib import SMTP, SMTPException, SMTPResponseException

from services.notifications.settings import NotificationsSettings

Kind = Literal["accepted", "refused", "failed", "unknown", "stale"]
Fresh = Callable[[], bool]
_ID = re.compile(r"[A-Za-z0-9._<>@-]{1,120}")
_IDLE_SECONDS = 20.0


class Outcome(NamedTuple):
    """What came of a call.

    `accepted`; `refused`: never will be; `failed`: not this time, and surely not sent; `unknown`: handed over without an
    answer; `stale`: not begun, since the last check had become too old. `error_code` is a number or word of ours.
    """

    kind: Kind
    error_code: str = ""
    provider_message_id: str = ""
    retry_after: float = 0.0


class Parcel(NamedTuple):
    """What goes to the provider."""

    message_id: str
    to: str
    subject: str
    text: str


class Provider(Protocol):
    """`fresh` is asked at the last moment at which a call can still be left undone."""

    async def send(self, parcel: Parcel, fresh: Fresh) -> Outcome: ...

    async def close(self) -> None: ...


def providers(settings: NotificationsSettings) -> dict[str, Provider]:
    """The configured ones by channel."""
    found: dict[str, Provider] = {}
    if settings.sms_url:
        found["SMS"] = HttpSms(settings)
    if settings.smtp_url:
        found["EMAIL"] = Smtp(settings)
    return found


class _TooOld(Exception):
    """The check had become too old before anything left."""


class HttpSms:
    """Texts in the form of the large providers. Their create call takes no key: an answer that is missing is `unknown`."""

    def __init__(self, settings: NotificationsSettings) -> None:
        self._url = f"{settings.sms_url.rstrip('/')}/2010-04-01/Accounts/{settings.sms_account}/Messages.json"
        self._from = settings.sms_from
        self._callback = settings.sms_callback_url.rstrip("/")
        limits = httpx2.Limits(
            max_connections=settings.provider_connections, max_keepalive_connections=settings.provider_connections
        )
        self._client = httpx2.AsyncClient(
            auth=(settings.sms_account, settings.sms_token),
            timeout=httpx2.Timeout(settings.provider_timeout, connect=min(2.0, settings.provider_timeout)),
            limits=limits,
            trust_env=False,
        )

    async def send(self, parcel: Parcel, fresh: Fresh) -> Outcome:
        begun = False

        async def trace(step: str, _about: dict[str, Any]) -> None:
            nonlocal begun
            if step.endswith("send_request_headers.started"):
                if not fresh():
                    raise _TooOld
                begun = True

        form = {
            "To": parcel.to,
            "From": self._from,
            "Body": parcel.text.strip(),
        }
        if self._callback:  # nothing here answers one: without a receiver of one's own, a dead address would be called
            form["StatusCallback"] = f"{self._callback}/{parcel.message_id}"
        try:
            answer = await self._client.post(self._url, data=form, extensions={"trace": trace})
        except _TooOld:
            return Outcome("stale")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            return Outcome("unknown" if begun else "failed", type(error).__name__)
        return _judged(answer)

    async def close(self) -> None:
        await self._client.aclose()


def _judged(answer: httpx2.Response) -> Outcome:
    said: Any = None
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            said = answer.json()
        except ValueError:
            said = None
    said = said if isinstance(said, dict) else {}
    status, code = answer.status_code, said.get("code")
    # Only a number: the provider's message may quote the text or the phone number.
    error_code = str(code) if isinstance(code, int) else f"http-{status}"
    if status < 300:
        sid = said.get("sid")
        return Outcome("accepted", "", sid if isinstance(sid, str) and _ID.fullmatch(sid) else "")
    # The provider says that it did not take it, or doesn't know us: that is nothing about this message.
    if status in (401, 403, 404, 429, 500, 503) or status < 400:
        wait = answer.headers.get("retry-after", "")
        return Outcome("failed", error_code, retry_after=min(float(wait), 300.0) if wait.isdecimal() else 0.0)
    if status == 408 or status > 500:  # a proxy in between speaks: what lies behind it may have taken it
        return Outcome("unknown", error_code)
    return Outcome("refused", error_code)


class Smtp:
    """E-mail over a few kept connections."""

    def __init__(self, settings: NotificationsSettings) -> None:
        url = urlsplit(settings.smtp_url)
        if url.scheme not in ("smtp", "smtps", "smtp+starttls") or not url.hostname:
            raise ValueError("CARE_SMTP_URL is smtp://, smtp+starttls:// or smtps:// with a host")
        self._options: dict[str, Any] = {
            "hostname": url.hostname,
            "port": url.port or (465 if url.scheme == "smtps" else 587),
            "use_tls": url.scheme == "smtps",
            "start_tls": {"smtp": None, "smtps": False, "smtp+starttls": True}[url.scheme],
            "username": unquote(url.username) if url.username else None,
            "password": unquote(url.password) if url.password else None,
            "timeout": settings.provider_timeout,
        }
        self._from = settings.smtp_from
        self._sender = parseaddr(self._from)[1]
        self._domain = self._sender.rpartition("@")[2] or "localhost"
        self._idle: list[tuple[float, SMTP]] = []
        self._most = settings.provider_connections

    async def send(self, parcel: Parcel, fresh: Fresh) -> Outcome:
        message_id = f"<{parcel.message_id}@{self._domain}>"
        try:
            content = self._content(parcel, message_id)
        except (MessageError, ValueError):
            return Outcome("refused", "address-invalid")
        try:
            client = await self._connection()
        except (SMTPException, OSError) as error:
            return Outcome("failed", type(error).__name__)
        outcome = await self._hand_over(client, parcel.to, content, fresh)
        if outcome.kind in ("accepted", "refused", "stale") and client.is_connected and len(self._idle) < self._most:
            self._idle.append((time.monotonic(), client))
        else:
            client.close()
        return outcome._replace(provider_message_id=message_id) if outcome.kind == "accepted" else outcome

    def _content(self, parcel: Parcel, message_id: str) -> bytes:
        message = EmailMessage(policy=SMTP_POLICY)
        message["From"] = self._from
        message["To"] = parcel.to
        message["Subject"] = parcel.subject
        message["Date"] = formatdate(usegmt=True)
        message["Message-ID"] = message_id
        message["Auto-Submitted"] = "auto-generated"
        message["List-Unsubscribe"] = f"<mailto:{self._sender}?subject=unsubscribe>"
        message.set_content(parcel.text, cte="quoted-printable")
        return message.as_bytes()

    async def _connection(self) -> SMTP:
        while self._idle:
            since, client = self._idle.pop()
            if time.monotonic() - since < _IDLE_SECONDS and client.is_connected:
                try:
                    await client.rset()
                    return client
                except (SMTPException, OSError):
                    pass  # the server had closed it meanwhile
            client.close()
        client = SMTP(**self._options)
        try:
            await client.connect()
        except BaseException:
            client.close()
            raise
        return client

    async def _hand_over(self, client: SMTP, to: str, content: bytes, fresh: Fresh) -> Outcome:
        if not fresh():
            return Outcome("stale")
        try:
            await client.mail(self._sender)
            await client.rcpt(to)
        except UnicodeError:
            return Outcome("refused", "address-invalid")
        except SMTPResponseException as error:
            return Outcome("refused" if error.code >= 500 else "failed", f"smtp-{error.code}")
        except (SMTPException, OSError) as error:
            return Outcome("failed", type(error).__name__)
        try:
            await client.data(content)
        except SMTPResponseException as error:
            return Outcome("refused" if error.code >= 500 else "failed", f"smtp-{error.code}")
        except (SMTPException, OSError) as error:
            return Outcome("unknown", type(error).__name__)
        return Outcome("accepted")

    async def close(self) -> None:
        for _, client in self._idle:
            client.close()
        self._idle.clear()
