"""The development mailbox: a real SMTP server and an HTTP provider of SMS in the form of the large ones, for messages that reach nobody."""

import asyncio
import base64
import contextlib
import email
import email.policy
import html
import os
import re
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qs

import httpx2
import orjson
import uvicorn
from aiosmtpd.smtp import SMTP, Envelope
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from system.process import LOG_KEPT_BYTES, LOOPBACK, free_port, write_private

PAGE: Final = "/dev/mailbox"
ACCOUNT: Final = "ACcaredevelopment"
_KEPT = 5000
_MESSAGES = "/2010-04-01/Accounts/{account}/Messages.json"

Fault = Literal["429", "500", "slow", "timeout"]
"""What the next call meets: too many, broken, a slow answer, or taken in without any answer in time."""


@dataclass(frozen=True, slots=True)
class Letter:
    """One message that came in. `channel` is "sms" or "email"; `status` as the provider tells it; `time` ISO 8601 in UTC."""

    id: str
    time: str
    channel: str
    sender: str
    recipient: str
    text: str
    subject: str = ""
    html: str = ""
    status: str = "delivered"
    status_callback: str = ""


class Letters:
    """The messages in a mailbox's file, read on as it grows: also from other processes. A later line of one id replaces the former."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._offset = 0
        self._known: dict[str, Letter] = {}

    def read(self) -> list[Letter]:
        """All that are kept, oldest first."""
        self.fresh()
        return list(self._known.values())

    def fresh(self) -> list[Letter]:
        """Those that are new since the last call."""
        try:
            with self.file.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # begun anew
                    self._offset, self._known = 0, {}
                file.seek(self._offset)
                tail = file.read()
        except FileNotFoundError:
            return []
        found = []
        whole = tail.rfind(b"\n") + 1  # what a killed process wrote half is no message
        for line in tail[:whole].splitlines():
            with contextlib.suppress(orjson.JSONDecodeError, TypeError):
                letter = Letter(**orjson.loads(line))
                if letter.id not in self._known:
                    found.append(letter)
                self._known[letter.id] = letter
        self._offset += whole
        for old in list(self._known)[: max(0, len(self._known) - _KEPT)]:
            del self._known[old]
        return found


class Mailbox:
    """Listens on loopback: SMTP on `smtp_port`, the SMS provider and the page on `http_port`.

    `folder/mailbox.jsonl` (0600) keeps what came in. `fail` makes the next calls fail, for tests; the same as `POST /dev/faults`
    {"channel": "sms", "fault": "429", "count": 1, "seconds": 5}.
    """

    def __init__(self, folder: Path, *, smtp_port: int | None = None, http_port: int | None = None) -> None:
        self.file = folder / "mailbox.jsonl"
        self.token = secrets.token_urlsafe(16)
        """The SMS provider's password; ACCOUNT is the user."""
        self.smtp_port, self.http_port = smtp_port or 0, http_port or 0
        self.letters = Letters(self.file)
        self._faults: dict[str, deque[tuple[Fault, float]]] = {"sms": deque(), "email": deque()}
        self._smtp: asyncio.Server | None = None
        self._http: uvicorn.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def smtp_url(self) -> str:
        """CARE_SMTP_URL."""
        return f"smtp://{LOOPBACK}:{self.smtp_port}"

    @property
    def sms_url(self) -> str:
        """CARE_SMS_URL."""
        return f"http://{LOOPBACK}:{self.http_port}"

    async def start(self) -> None:
        """Begin to listen; the ports stay over `stop` and `start`."""
        if self.file.exists() and self.file.stat().st_size > LOG_KEPT_BYTES:
            os.replace(self.file, self.file.with_suffix(".jsonl.1"))
        if not self.file.exists():
            write_private(self.file, "")
        elif self.file.read_bytes()[-1:] not in (b"", b"\n"):
            with self.file.open("ab") as file:  # a killed process left half a line
                file.write(b"\n")
        self.smtp_port, self.http_port = free_port(self.smtp_port or None), free_port(self.http_port or None)
        loop = asyncio.get_running_loop()
        self._smtp = await loop.create_server(self._protocol, LOOPBACK, self.smtp_port)
        listening = socket.create_server((LOOPBACK, self.http_port))
        config = uvicorn.Config(
            self.app(), lifespan="off", log_config=None, access_log=False, server_header=False, loop="none", ws="none",
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._http = uvicorn.Server(config)
        # Not `serve()`: it would capture the process's signals.
        self._run(self._http._serve([listening]))
        while not self._http.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop listening; what came in stays."""
        if self._smtp is not None:
            self._smtp.close()
            self._smtp = None
        if self._http is not None:
            self._http.should_exit = True
            self._http = None
        done, pending = await asyncio.wait(self._tasks, timeout=2) if self._tasks else (set(), set())
        for task in pending:
            task.cancel()
        await asyncio.gather(*done, *pending, return_exceptions=True)

    def fail(self, channel: str, fault: Fault, count: int = 1, seconds: float = 5.0) -> None:
        """The next `count` calls of "sms" or "email" meet a fault; `seconds` says how slow."""
        if fault not in ("429", "500", "slow", "timeout"):
            raise ValueError("a fault is 429, 500, slow or timeout")
        self._faults[channel].extend([(fault, seconds)] * count)

    def heal(self) -> None:
        """No more faults."""
        for queue in self._faults.values():
            queue.clear()

    def keep(self, letter: Letter) -> None:
        """Append to the file."""
        line = orjson.dumps(asdict(letter)) + b"\n"
        with self.file.open("ab") as file:
            file.write(line)

    def _run(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- SMTP ----------------------------------------------------------------------------------------------------------

    def _protocol(self) -> SMTP:
        return SMTP(self, hostname="mailbox.care.localhost", ident="care development mailbox", enable_SMTPUTF8=True)

    async def handle_DATA(self, _server: SMTP, _session: object, envelope: Envelope) -> str:
        """aiosmtpd's hook: a whole message."""
        fault, seconds = self._faults["email"].popleft() if self._faults["email"] else (None, 0.0)
        if fault == "429":
            return "451 4.7.1 Too many messages, try again later"
        if fault == "500":
            return "554 5.3.0 Transaction failed"
        content = envelope.content if isinstance(envelope.content, bytes) else b""
        for letter in _letters(content, envelope.mail_from or "", [str(to) for to in envelope.rcpt_tos]):
            self.keep(letter)
        if fault in ("slow", "timeout"):
            await asyncio.sleep(seconds)
        return "250 2.0.0 Message accepted for delivery"

    # -- SMS -----------------------------------------------------------------------------------------------------------

    def app(self) -> Starlette:
        """The provider, the page and the switches of faults."""
        return Starlette(
            routes=[
                Route(_MESSAGES, self._create, methods=["POST"]),
                Route(_MESSAGES, self._list, methods=["GET"]),
                Route(_MESSAGES.replace(".json", "/{sid}.json"), self._read, methods=["GET"]),
                Route("/dev/faults", self._switch, methods=["POST", "DELETE"]),
                Route(PAGE, lambda request: _page(request, self.letters.read()), methods=["GET"]),
            ]
        )

    def _refused(self, request: Request) -> Response | None:
        wanted = base64.b64encode(f"{ACCOUNT}:{self.token}".encode()).decode()
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic" and secrets.compare_digest(given.encode(), wanted.encode()):
            return None if request.path_params["account"] == ACCOUNT else _sms_error(404, 20404, "No such account")
        return _sms_error(401, 20003, "Authenticate")

    async def _create(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        fault, seconds = self._faults["sms"].popleft() if self._faults["sms"] else (None, 0.0)
        if fault == "429":
            return _sms_error(429, 20429, "Too Many Requests", {"retry-after": "1"})
        if fault == "500":
            return _sms_error(500, 20500, "Internal Server Error")
        fields = {
            name: values[-1] for name, values in parse_qs((await request.body()).decode(errors="replace")).items()
        }
        for name, code in (("To", 21604), ("From", 21603), ("Body", 21602)):
            if not fields.get(name):
                return _sms_error(400, code, f"A '{name}' is required.")
        if not re.fullmatch(r"\+[1-9]\d{6,14}", fields["To"]):
            return _sms_error(400, 21211, "The 'To' number is not a valid phone number.")
        callback = fields.get("StatusCallback", "")
        letter = Letter(
            id="SM" + secrets.token_hex(16), time=_now(), channel="sms", sender=fields["From"], recipient=fields["To"],
            text=fields["Body"], status="queued", status_callback=callback,
        )  # fmt: skip
        self.keep(letter)
        self._run(self._deliver(letter))
        if fault in ("slow", "timeout"):
            await asyncio.sleep(seconds)
        return JSONResponse(_sms(letter), 201)

    async def _deliver(self, letter: Letter) -> None:
        await asyncio.sleep(0.05)
        self.keep(replace(letter, status="delivered"))
        if letter.status_callback:
            said = {
                "MessageSid": letter.id,
                "MessageStatus": "delivered",
                "To": letter.recipient,
                "From": letter.sender,
            }
            with contextlib.suppress(httpx2.HTTPError, httpx2.InvalidURL, ValueError):  # told once, as a courtesy
                async with httpx2.AsyncClient(timeout=2) as client:
                    await client.post(letter.status_callback, data=said)

    async def _list(self, request: Request) -> Response:
        """Latest first; `To`, `From` and `DateSent`, `DateSent>`, `DateSent<` (a day or an instant) narrow it."""
        if (refused := self._refused(request)) is not None:
            return refused
        asked = request.query_params
        found = [letter for letter in self.letters.read() if letter.channel == "sms"]
        for name, field in (("To", "recipient"), ("From", "sender")):
            if name in asked:
                found = [letter for letter in found if getattr(letter, field) == asked[name]]
        try:
            found = [letter for letter in found if _in_time(letter, asked)]
        except ValueError:
            return _sms_error(400, 20001, "A date is YYYY-MM-DD or an instant of ISO 8601.")
        size = min(int(asked.get("PageSize", "50")) if asked.get("PageSize", "50").isdecimal() else 50, 1000)
        return JSONResponse({"messages": [_sms(letter) for letter in found[::-1][:size]], "page": 0, "page_size": size})

    async def _read(self, request: Request) -> Response:
        if (refused := self._refused(request)) is not None:
            return refused
        found = [letter for letter in self.letters.read() if letter.id == request.path_params["sid"]]
        return JSONResponse(_sms(found[0])) if found else _sms_error(404, 20404, "No such message")

    async def _switch(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.heal()
            return Response(status_code=204)
        try:
            wanted = orjson.loads(await request.body())
            self.fail(wanted["channel"], wanted["fault"], wanted.get("count", 1), wanted.get("seconds", 5.0))
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "channel sms or email; fault 429, 500, slow or timeout; count; seconds"}, 400)
        return Response(status_code=204)


def page(file: Path) -> Starlette:
    """The page `/dev/mailbox` over a mailbox's file: to be mounted beside the gateway, in development only."""
    letters = Letters(file)
    return Starlette(routes=[Route(PAGE, lambda request: _page(request, letters.read()), methods=["GET"])])


def line(letter: Letter) -> str:
    """A message for a terminal."""
    at = datetime.fromisoformat(letter.time).astimezone()
    head = f"{at:%Y-%m-%d %H:%M:%S}  {'SMS' if letter.channel == 'sms' else 'E-mail'} to {letter.recipient}"
    body = "\n".join(f"    {each}" for each in letter.text.strip().splitlines())
    return head + (f": {letter.subject}" if letter.subject else "") + f"\n{body}\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _letters(content: bytes, sender: str, recipients: Sequence[str]) -> list[Letter]:
    parsed = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(parsed, EmailMessage)
    bodies = {kind: parsed.get_body((kind,)) for kind in ("plain", "html")}
    texts = {
        kind: str(body.get_content()).replace("\r\n", "\n") if body is not None else "" for kind, body in bodies.items()
    }
    return [
        Letter(
            id=f"EM{time.time_ns():x}{secrets.token_hex(6)}", time=_now(), channel="email", sender=sender, recipient=to,
            subject=str(parsed.get("subject", "")), text=texts["plain"] or texts["html"], html=texts["html"],
        )
        for to in recipients
    ]  # fmt: skip


def _sms(letter: Letter) -> dict[str, Any]:
    at = format_datetime(datetime.fromisoformat(letter.time))
    return {
        "sid": letter.id, "account_sid": ACCOUNT, "api_version": "2010-04-01", "to": letter.recipient, "from": letter.sender,
        "body": letter.text, "status": letter.status, "direction": "outbound-api", "num_segments": "1", "num_media": "0",
        "date_created": at, "date_updated": at, "date_sent": at, "error_code": None, "error_message": None, "price": None,
        "price_unit": "USD", "messaging_service_sid": None,
        "uri": _MESSAGES.format(account=ACCOUNT).replace(".json", f"/{letter.id}.json"),
    }  # fmt: skip


def _sms_error(status: int, code: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"code": code, "message": message, "status": status}, status, headers)


def _in_time(letter: Letter, asked: Mapping[str, str]) -> bool:
    at = datetime.fromisoformat(letter.time)
    for name, value in asked.items():
        if not name.startswith("DateSent"):
            continue
        if len(value) == 10:
            day = date.fromisoformat(value)
            fits = {"": at.date() == day, ">": at.date() >= day, "<": at.date() <= day}
        else:
            instant = datetime.fromisoformat(value.replace("Z", "+00:00"))
            instant = instant if instant.tzinfo else instant.replace(tzinfo=UTC)
            fits = {"": at == instant, ">": at >= instant, "<": at <= instant}
        if not fits[name.removeprefix("DateSent")[:1]]:
            return False
    return True


_LINK = re.compile(r"https?://[^\s<>\"']+")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color:#1c2733;background:#f6f8fa}
article{background:#fff;border:1px solid #d5dde5;border-radius:8px;padding:.8rem 1rem;margin:.8rem 0}
header{color:#52606d;font-size:13px}pre{white-space:pre-wrap;font:inherit;margin:.4rem 0 0}
"""
_NO_STORE = {
    "cache-control": "no-store",
    "vary": "Accept",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "referrer-policy": "no-referrer",
}


def _page(request: Request, letters: list[Letter]) -> Response:
    latest = letters[::-1]
    if "text/html" not in request.headers.get("accept", ""):
        return Response(
            orjson.dumps({"messages": [asdict(letter) for letter in latest]}),
            headers=_NO_STORE,
            media_type="application/json",
        )
    articles = "".join(_article(letter) for letter in latest[:200]) or "<p>Nothing has come yet.</p>"
    return HTMLResponse(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta http-equiv=refresh content=5><title>Mailbox</title><style>{_STYLE}</style>"
        f"<h1>Development mailbox</h1><p>Nothing here has reached anybody.</p>{articles}",
        headers=_NO_STORE,
    )


def _article(letter: Letter) -> str:
    kind = "SMS" if letter.channel == "sms" else "E-mail"
    at = datetime.fromisoformat(letter.time)
    text = html.escape(letter.text.strip())
    text = _LINK.sub(lambda found: f'<a href="{found[0]}">{found[0]}</a>', text)
    subject = f"<strong>{html.escape(letter.subject)}</strong>" if letter.subject else ""
    head = f"{at:%Y-%m-%d %H:%M:%S} UTC · {kind} to {html.escape(letter.recipient)} · {html.escape(letter.status)}"
    return f"<article><header>{head}</header>{subject}<pre>{text}</pre></article>"
