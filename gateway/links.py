"""Patients' links: a survey or an offered time as a page without a login, readable by everybody, with or without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl
from zoneinfo import ZoneInfo

import grpc
from babel.dates import format_date, format_time
from care.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from care.scheduling.v1 import waitlist_pb2, waitlist_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from chassis.clients import Clients
from chassis.errors import Invalid, NotFound, Problem, problem_from_rpc
from gateway.http_errors import http_status

PREFIX: Final = "/p/"
TEMPLATE: Final = "/p/{token}"
FORM: Final = "application/x-www-form-urlencoded"
_TOKEN = re.compile(r"[sw]-[A-Za-z0-9_-]{8,98}")
_OFFER: Final = "w-"
_LANGUAGE = re.compile(r"([A-Za-z]{2,3}(?:-[A-Za-z0-9]{2,8})*)(?:\s*;\s*q=([01](?:\.[0-9]{1,3})?))?")
_WHOLE = re.compile(r"-?[0-9]{1,6}")
_ANSWER: Final = "answer."
_MOST_LANGUAGES: Final = 20
_MOST_FIELDS: Final = 300
_LONGEST_TEXT: Final = 4000
_FOLDER = Path(__file__).parent / "pages"
_Item = feedback_pb2.Questionnaire.Item

TEXTS: Final[Mapping[str, Mapping[str, str]]] = {
    "en": {
        "required": "required",
        "optional": "optional",
        "send": "Send answers",
        "intro": "Your answers go to your clinic. Questions marked as required need an answer.",
        "thanks": "Thank you",
        "answered": "Your answers have arrived. You can close this page.",
        "check": "Please check your answers",
        "check_text": "Some answers are missing or can't be taken. Nothing has been sent yet.",
        "missing": "Please answer this question.",
        "help": "Help is there for you now",
        "call_988": "Call or text 988 (Suicide & Crisis Lifeline, day and night, free)",
        "call_911": "In an emergency call 911",
        "unknown": "This link doesn't work",
        "unknown_text": "Please check that you opened the whole link from your message, or ask your clinic for a new one.",
        "expired": "This link has expired",
        "expired_text": "The time to answer is over. If you would still like to tell us something, please call your clinic.",
        "taken": "This survey was answered already",
        "taken_text": "We have kept the answers that came first. If they should be changed, please call your clinic.",
        "offer": "A time is free for you",
        "offer_text": "We are holding this time for you:",
        "offer_until": "Please answer by",
        "offer_accept": "Take this time",
        "offer_decline": "No, thank you",
        "offer_keep": "If you decline, you stay on the waiting list.",
        "offer_ACCEPTED": "The time is yours",
        "offer_ACCEPTED_text": "Your visit is booked. If you had a later visit of the same kind, it is cancelled.",
        "offer_DECLINED": "You declined this time",
        "offer_DECLINED_text": "You stay on the waiting list. We will write to you when another time is free.",
        "offer_place": "Your clinic",
        "offer_call": "Questions? Call",
        "offer_over": "This offer has ended",
        "offer_over_text": "The time to answer is over. You are still on the waiting list. If you have questions, please call your clinic.",
        "offer_taken": "This offer was answered already",
        "offer_taken_text": "We have kept the first answer. If it should be changed, please call your clinic.",
        "away": "We can't show this page right now",
        "away_text": "Please try again in a few minutes. Your link still works.",
    },
    "es": {
        "required": "obligatoria",
        "optional": "opcional",
        "send": "Enviar respuestas",
        "intro": "Sus respuestas llegan a su clínica. Las preguntas obligatorias necesitan una respuesta.",
        "thanks": "Gracias",
        "answered": "Sus respuestas han llegado. Puede cerrar esta página.",
        "check": "Revise sus respuestas",
        "check_text": "Faltan respuestas o algunas no son válidas. Todavía no se ha enviado nada.",
        "missing": "Responda a esta pregunta, por favor.",
        "help": "Hay ayuda para usted ahora",
        "call_988": "Llame o envíe un mensaje de texto al 988 (Línea de Prevención del Suicidio y Crisis, día y noche, gratis)",
        "call_911": "En una emergencia llame al 911",
        "unknown": "Este enlace no funciona",
        "unknown_text": "Compruebe que abrió el enlace completo de su mensaje, o pida uno nuevo a su clínica.",
        "expired": "Este enlace ha caducado",
        "expired_text": "El plazo para responder ha terminado. Si todavía quiere contarnos algo, llame a su clínica.",
        "taken": "Esta encuesta ya fue respondida",
        "taken_text": "Hemos guardado las primeras respuestas. Si hay que cambiarlas, llame a su clínica.",
        "offer": "Hay una hora libre para usted",
        "offer_text": "Le estamos guardando esta hora:",
        "offer_until": "Responda antes de",
        "offer_accept": "Acepto esta hora",
        "offer_decline": "No, gracias",
        "offer_keep": "Si la rechaza, sigue en la lista de espera.",
        "offer_ACCEPTED": "La hora es suya",
        "offer_ACCEPTED_text": "Su cita está reservada. Si tenía una cita posterior del mismo tipo, queda cancelada.",
        "offer_DECLINED": "Rechazó esta hora",
        "offer_DECLINED_text": "Sigue en la lista de espera. Le escribiremos cuando haya otra hora libre.",
        "offer_place": "Su clínica",
        "offer_call": "¿Preguntas? Llame al",
        "offer_over": "Esta oferta ha terminado",
        "offer_over_text": "El plazo para responder ha terminado. Sigue en la lista de espera. Si tiene preguntas, llame a su clínica.",
        "offer_taken": "Esta oferta ya fue respondida",
        "offer_taken_text": "Hemos guardado la primera respuesta. Si hay que cambiarla, llame a su clínica.",
        "away": "No podemos mostrar esta página ahora",
        "away_text": "Inténtelo de nuevo en unos minutos. Su enlace sigue funcionando.",
    },
}
_SORRY: Final = {
    "LINK_UNKNOWN": "unknown",
    "LINK_EXPIRED": "expired",
    "ALREADY_ANSWERED": "taken",
    "OFFER_ANSWERED": "offer_taken",
}


@dataclass(frozen=True, slots=True)
class Page:
    """An HTML answer."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One radio button."""

    value: int
    text: str


@dataclass(frozen=True, slots=True)
class Question:
    """One question as the page shows it."""

    name: str
    text: str
    choices: Sequence[Choice]
    scale: bool
    required: bool
    given: str
    wrong: bool


class Links:
    """Shows and takes surveys in the gateway's own name; the token in the path is the visitor's only credential."""

    def __init__(self, clients: Clients, *, timeout: float = 10.0) -> None:
        self._clients = clients
        self._timeout = timeout
        environment = Environment(
            loader=FileSystemLoader(_FOLDER),
            autoescape=select_autoescape(default=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._template = environment.get_template("survey.html")
        self._offer_template = environment.get_template("offer.html")
        style = (_FOLDER / "survey.css").read_text()
        self._style = Markup(style)  # noqa: S704 - our own file
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        self._headers = (
            (b"content-type", b"text/html; charset=utf-8"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
            (b"content-security-policy", policy.encode()),
            (b"x-robots-tag", b"noindex, nofollow"),
        )

    async def get(self, token: str, headers: Mapping[str, str]) -> Page:
        """The survey, or the thanks where it is answered. Uses nothing up: previews and scanners fetch links."""
        try:
            if token.startswith(_OFFER):
                return self._offer(await self._show_offer(token), headers)
            return self._survey(await self._look(token, accepted_languages(headers)))
        except Problem as problem:
            return self.error(problem, headers)

    async def post(self, token: str, headers: Mapping[str, str], body: bytes) -> Page:
        """Takes the answers; the same ones again give the same page."""
        form: dict[str, str] = {}
        try:
            _known(token)
            form = _form(body)
            if token.startswith(_OFFER):
                return self._offer(await self._answer_offer(token, form), headers)
            language = form.get("language", "")
            request = feedback_pb2.AnswerSurveyByLinkRequest(
                token=token, answers=_answers(form), language=language if _LANGUAGE.fullmatch(language) else ""
            )
            return self._survey(await self._call("AnswerSurveyByLink", request))
        except Problem as problem:
            if token.startswith(_OFFER) or problem.reason not in ("ANSWER_INVALID", "FIELD_INVALID"):
                return self.error(problem, headers)
            return await self._again(token, headers, form, problem)

    async def _again(self, token: str, headers: Mapping[str, str], form: Mapping[str, str], problem: Problem) -> Page:
        """The same survey with what was typed, and what is wrong with it."""
        try:
            survey = await self._look(token, [form.get("language", ""), *accepted_languages(headers)])
        except Problem as other:
            return self.error(other, headers)
        wrong = problem.metadata.get("link_id", "")
        return self._survey(survey, form=form, wrong=wrong, status=400, reason=problem.reason)

    async def _look(self, token: str, languages: Sequence[str]) -> feedback_pb2.SurveyByLink:
        _known(token)
        wished = [each for each in languages if _LANGUAGE.fullmatch(each) and len(each) <= 20][:_MOST_LANGUAGES]
        return await self._call("GetSurveyByLink", feedback_pb2.GetSurveyByLinkRequest(token=token, languages=wished))

    async def _show_offer(self, token: str) -> waitlist_pb2.WaitlistOfferByLink:
        _known(token)
        return await self._ask_waitlist(
            "GetWaitlistOfferByLink", waitlist_pb2.GetWaitlistOfferByLinkRequest(token=token)
        )

    async def _answer_offer(self, token: str, form: Mapping[str, str]) -> waitlist_pb2.WaitlistOfferByLink:
        """Raises Invalid `ANSWER_INVALID` for a form that says neither yes nor no."""
        answer = form.get("answer", "")
        if answer not in ("accept", "decline"):
            raise Invalid("ANSWER_INVALID", "The answer must be accept or decline.")
        request = waitlist_pb2.AnswerWaitlistOfferByLinkRequest(token=token, accept=answer == "accept")
        return await self._ask_waitlist("AnswerWaitlistOfferByLink", request)

    async def _ask_waitlist(self, name: str, request: Any) -> waitlist_pb2.WaitlistOfferByLink:
        stub: Any = waitlist_pb2_grpc.WaitlistLinksServiceStub(self._clients.channel("scheduling"))
        try:
            answer: waitlist_pb2.WaitlistOfferByLink = await getattr(stub, name)(
                request, timeout=self._timeout, metadata=self._clients.own_metadata()
            )
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from error
        return answer

    async def _call(self, name: str, request: Any) -> feedback_pb2.SurveyByLink:
        stub: Any = feedback_pb2_grpc.SurveyLinksServiceStub(self._clients.channel("feedback"))
        try:
            answer: feedback_pb2.SurveyByLink = await getattr(stub, name)(
                request, timeout=self._timeout, metadata=self._clients.own_metadata()
            )
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from error
        return answer

    # -- HTML --------------------------------------------------------------------------------------------------------

    def _survey(
        self,
        survey: feedback_pb2.SurveyByLink,
        *,
        form: Mapping[str, str] | None = None,
        wrong: str = "",
        status: int = 200,
        reason: str | None = None,
    ) -> Page:
        language = survey.language or "en"
        questionnaire = survey.questionnaire
        questions = [_question(item, language, form, wrong) for item in questionnaire.items]
        return self._page(
            status,
            language,
            reason,
            title=in_language(questionnaire.title, language) or in_texts(language)["thanks"],
            questions=[] if survey.answered else questions,
            answered=survey.answered,
            critical=survey.critical,
            crisis_help=in_language(questionnaire.crisis_help, language),
            problem=form is not None,
            sorry="",
        )

    def _offer(self, offer: waitlist_pb2.WaitlistOfferByLink, headers: Mapping[str, str]) -> Page:
        """Time and place, and the two buttons as long as the offer is open."""
        language = next((each for each in accepted_languages(headers) if each.split("-")[0].lower() in TEXTS), "en")
        short = language.split("-")[0].lower()
        html = self._offer_template.render(
            language=short,
            text=in_texts(short),
            style=self._style,
            status=waitlist_pb2.WaitlistOffer.Status.Name(offer.status),
            when=_local(offer.start_time, offer.time_zone, short),
            until=_local(offer.expire_time, offer.time_zone, short),
            clinic=offer.clinic,
            phone=offer.phone,
        )
        return Page(200, self._headers, html.encode())

    def error(self, problem: Problem, headers: Mapping[str, str]) -> Page:
        """A friendly page for whatever went wrong; the status is the same as the API's."""
        sorry = _SORRY.get(problem.reason, "")
        if sorry == "expired" and "waitlist" in problem.metadata.get("kind", ""):
            sorry = "offer_over"
        status = http_status(problem, if_match=False)
        if not sorry:
            sorry = "unknown" if status in (400, 404) else "away"
        language = next((each for each in accepted_languages(headers) if each.split("-")[0].lower() in TEXTS), "en")
        page = self._page(
            status,
            language,
            problem.reason,
            title=in_texts(language)[sorry],
            questions=[],
            answered=False,
            critical=False,
            crisis_help="",
            problem=False,
            sorry=sorry,
        )
        if status != 503:
            return page
        return Page(page.status, (*page.headers, (b"retry-after", b"30")), page.body, page.reason)

    def _page(self, status: int, language: str, reason: str | None, **values: Any) -> Page:
        html = self._template.render(language=language, text=in_texts(language), style=self._style, **values)
        return Page(status, self._headers, html.encode(), reason)


def _local(instant: Timestamp, zone: str, language: str) -> str:
    """Day and time by the clinic's clock, with the zone's abbreviation."""
    local, locale = instant.ToDatetime(tzinfo=UTC).astimezone(ZoneInfo(zone or "UTC")), f"{language}_US"
    told = f"{format_date(local, 'full', locale=locale)}, {format_time(local, 'short', locale=locale)}"
    return f"{told} {local.tzname() or ''}".replace("\u202f", " ")


def in_texts(language: str) -> Mapping[str, str]:
    """The page's own words."""
    return TEXTS.get(language.split("-")[0].lower(), TEXTS["en"])


def in_language(texts: Mapping[str, str], language: str) -> str:
    """A text in the language, else in its main language, in English, or in whatever there is; "" without any."""
    for wished in (language, language.split("-")[0], "en"):
        if wished in texts:
            return texts[wished]
    return next((texts[each] for each in sorted(texts)), "")


def accepted_languages(headers: Mapping[str, str]) -> list[str]:
    """Accept-Language, preferred first; what is malformed is left out."""
    wished: list[tuple[float, str]] = []
    for part in headers.get("accept-language", "")[:500].split(","):
        found = _LANGUAGE.fullmatch(part.strip())
        if found is not None and (weight := float(found[2] or "1")) > 0:
            wished.append((-weight, found[1]))
    return [language for _, language in sorted(wished, key=lambda each: each[0])][:_MOST_LANGUAGES]


def _known(token: str) -> None:
    if not _TOKEN.fullmatch(token):
        raise NotFound("LINK_UNKNOWN", "There is no such link.")


def _form(body: bytes) -> dict[str, str]:
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_MOST_FIELDS, errors="strict")
    except (UnicodeDecodeError, ValueError):
        raise Invalid("ANSWER_INVALID", "The form can't be read.") from None
    return dict(pairs)


def _answers(form: Mapping[str, str]) -> list[feedback_pb2.Answer]:
    """A field `answer.<link_id>.value` is a choice, `answer.<link_id>.text` are words; empty ones are no answers."""
    answers = []
    for name, value in form.items():
        link_id, _, kind = name.removeprefix(_ANSWER).rpartition(".")
        if not name.startswith(_ANSWER) or not link_id or not value.strip():
            continue
        if kind == "value" and _WHOLE.fullmatch(value):
            answers.append(feedback_pb2.Answer(link_id=link_id, value=int(value)))
        elif kind == "text" and "\x00" not in value:
            # Browsers send line breaks as two characters but count them as one.
            answers.append(feedback_pb2.Answer(link_id=link_id, text=value.replace("\r\n", "\n")[:_LONGEST_TEXT]))
        else:
            raise Invalid("ANSWER_INVALID", "An answer can't be taken.", link_id=link_id)
    return answers


def _question(item: _Item, language: str, form: Mapping[str, str] | None, wrong: str) -> Question:
    scale = item.kind == _Item.SCALE
    if scale and item.options:
        labels = {option.value: in_language(option.text, language) for option in item.options}
        low, high = min(labels), max(labels)
        choices = [Choice(value, labels.get(value, "")) for value in range(low, min(high, low + 100) + 1)]
    else:
        choices = [Choice(option.value, in_language(option.text, language)) for option in item.options]
    name = f"{_ANSWER}{item.link_id}.{'text' if item.kind == _Item.TEXT else 'value'}"
    given = (form or {}).get(name, "")
    return Question(
        name=name,
        text=in_language(item.text, language),
        choices=[] if item.kind == _Item.TEXT else choices,
        scale=scale,
        required=item.required,
        given=given,
        wrong=form is not None and (item.link_id == wrong or (item.required and not given.strip())),
    )
