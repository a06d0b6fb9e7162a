"""Questionnaires: versions of content, never changed once made."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Index, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import Invalid
from chassis.model import Aggregate, base, status_type
from services.feedback.grading import Grade, critical_items, flaw, grade

Base = base()


class Status(enum.StrEnum):
    """FHIR publication-status."""

    DRAFT = "DRAFT"
    ACTIVE = "ACTIVE"
    RETIRED = "RETIRED"


class Questionnaire(Aggregate, Base):
    """A version of a set of questions. `items` and `scoring` are shaped as `care.feedback.v1.Questionnaire` says."""

    __tablename__ = "questionnaire"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name", "number", name="questionnaire_version_key"),
        Index(
            "questionnaire_after_visit",
            "tenant_id",
            "create_time",
            postgresql_where=text("after_visit AND status = 'ACTIVE'"),
        ),
    )
    aggregate = "questionnaire"
    subject_field = None

    name: Mapped[str]
    number: Mapped[int]
    status: Mapped[Status] = mapped_column(status_type(Status), default=Status.ACTIVE)
    title: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    items: Mapped[list[Any]] = mapped_column(JSONB)
    scoring: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    crisis_help: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    after_visit: Mapped[bool] = mapped_column(default=False)

    def check(self) -> None:
        """Raises Invalid `QUESTIONNAIRE_INVALID` with the field, `CRITICAL_WITHOUT_COVER`."""
        seen: set[str] = set()
        for place, item in enumerate(self.items):
            field = f"questionnaire.items[{place}]"
            if item["link_id"] in seen:
                raise _wrong("Each link_id may stand once.", f"{field}.link_id")
            seen.add(item["link_id"])
            values = [option.get("value", 0) for option in item.get("options", ())]
            if item["kind"] == "TEXT":
                if values or "critical_from" in item:
                    raise _wrong("A text takes neither options nor critical_from.", field)
            elif len(values) < 2 or len(set(values)) != len(values):
                raise _wrong("Options need two values at least, each once.", f"{field}.options")
            elif item["kind"] == "SCALE" and not 0 < values[-1] - values[0] <= _LONGEST_SCALE:
                raise _wrong(f"A scale rises over at most {_LONGEST_SCALE} steps.", f"{field}.options")
        if found := flaw(self.items, self.scoring):
            raise _wrong(found, "questionnaire.scoring")
        # Help that the reader can't read is none: it must be there in every language in which one can be asked.
        languages = set(self.title) or {"en"}
        if critical_items(self.items, self.scoring) and not languages <= {
            language for language, words in self.crisis_help.items() if words.strip()
        }:
            raise Invalid(
                "CRITICAL_WITHOUT_COVER",
                "A questionnaire with critical answers needs crisis_help in every language of its title.",
                field="questionnaire.crisis_help",
            )

    def language_for(self, wished: Iterable[str]) -> str:
        """The first wished language that it has, by main language too; else English, else any."""
        languages = self.title or self.items[0].get("text", {})
        for one in wished:
            for tag in (one, one.split("-")[0]):
                if tag in languages:
                    return tag
        return "en" if "en" in languages or not languages else min(languages)

    def taken(self, answers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers (`link_id`, `value`, `text`) in the order of the items, blank ones left out.

        Raises Invalid `ANSWER_INVALID`, which names the item and never the answer.
        """
        items = {item["link_id"]: item for item in self.items}
        kept: dict[str, dict[str, Any]] = {}
        for answer in answers:
            link_id = answer.get("link_id", "")
            if link_id not in items:
                raise Invalid("ANSWER_INVALID", "An answer is to no question of this questionnaire.")
            if link_id in kept or not _fits(items[link_id], answer):
                raise _refused(link_id)
            if (words := answer.get("text", "").strip()) or "value" in answer:
                kept[link_id] = {"link_id": link_id, "text": words} if words else {**answer}
        for link_id, item in items.items():
            if item.get("required") and link_id not in kept:
                raise _refused(link_id)
        return [kept[link_id] for link_id in items if link_id in kept]

    def grade(self, answers: Sequence[Mapping[str, Any]]) -> Grade:
        """Grade what `taken` gave."""
        values = {answer["link_id"]: answer["value"] for answer in answers if "value" in answer}
        return grade(self.items, self.scoring, values)


_LONGEST_SCALE = 100


def _fits(item: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    if item["kind"] == "TEXT":
        return "value" not in answer and "\x00" not in answer.get("text", "")
    if "text" in answer:
        return False
    if "value" not in answer:
        return True
    values = [option.get("value", 0) for option in item["options"]]
    return values[0] <= answer["value"] <= values[-1] if item["kind"] == "SCALE" else answer["value"] in values


def _wrong(message: str, field: str) -> Invalid:
    return Invalid("QUESTIONNAIRE_INVALID", message, field=field)


def _refused(link_id: str) -> Invalid:
    return Invalid("ANSWER_INVALID", "The answer to a question is missing or can't be taken.", link_id=link_id)
