"""The instruments that ship with the service, as questionnaire definitions: items, options, scoring and thresholds."""

from collections.abc import Sequence
from typing import Any

Definition = dict[str, Any]

_FREQUENCY = [
    {"code": "not-at-all", "text": "Not at all", "score": 0},
    {"code": "several-days", "text": "Several days", "score": 1},
    {"code": "more-than-half", "text": "More than half the days", "score": 2},
    {"code": "nearly-every-day", "text": "Nearly every day", "score": 3},
]

_PHQ = (
    "Little interest or pleasure in doing things",
    "Feeling down, depressed, or hopeless",
    "Trouble falling or staying asleep, or sleeping too much",
    "Feeling tired or having little energy",
    "Poor appetite or overeating",
    "Feeling bad about yourself, or that you are a failure or have let yourself or your family down",
    "Trouble concentrating on things, such as reading the newspaper or watching television",
    "Moving or speaking so slowly that other people could have noticed, or the opposite: being so fidgety or restless "
    "that you have been moving around a lot more than usual",
    "Thoughts that you would be better off dead, or of hurting yourself in some way",
)

_GAD = (
    "Feeling nervous, anxious, or on edge",
    "Not being able to stop or control worrying",
    "Worrying too much about different things",
    "Trouble relaxing",
    "Being so restless that it is hard to sit still",
    "Becoming easily annoyed or irritable",
    "Feeling afraid, as if something awful might happen",
)


def _frequency_items(prefix: str, questions: Sequence[str]) -> list[Definition]:
    return [
        {"link_id": f"{prefix}-{number}", "text": text, "type": "choice", "options": _FREQUENCY}
        for number, text in enumerate(questions, 1)
    ]


def _bands(**starts: int) -> list[Definition]:
    return [{"name": name.replace("_", "-"), "from": start} for name, start in starts.items()]


_LEAD = "Over the last 2 weeks, how often have you been bothered by any of the following problems?"

PHQ_2: Definition = {
    "code": "phq-2",
    "title": "PHQ-2",
    "lead": _LEAD,
    "items": _frequency_items("phq2", _PHQ[:2]),
    "scoring": {
        "method": "sum",
        "items": ["phq2-1", "phq2-2"],
        "minimum": 0,
        "maximum": 3,
        "bands": _bands(negative=0, positive=3),
        "bad": {"at_least": 3},
    },
}

PHQ_9: Definition = {
    "code": "phq-9",
    "title": "PHQ-9",
    "loinc": "44249-1",
    "total_loinc": "44261-6",
    "lead": _LEAD,
    "items": _frequency_items("phq9", _PHQ),
    "scoring": {
        "method": "sum",
        "items": [f"phq9-{number}" for number in range(1, 10)],
        "minimum": 0,
        "maximum": 3,
        "prorate_missing": 2,
        "bands": _bands(minimal=0, mild=5, moderate=10, moderately_severe=15, severe=20),
        "bad": {"at_least": 10},
        "critical": [{"link_id": "phq9-9", "above": 0}],
    },
}

GAD_7: Definition = {
    "code": "gad-7",
    "title": "GAD-7",
    "loinc": "69737-5",
    "total_loinc": "70274-6",
    "lead": _LEAD,
    "items": _frequency_items("gad7", _GAD),
    "scoring": {
        "method": "sum",
        "items": [f"gad7-{number}" for number in range(1, 8)],
        "minimum": 0,
        "maximum": 3,
        "prorate_missing": 2,
        "bands": _bands(minimal=0, mild=5, moderate=10, severe=15),
        "bad": {"at_least": 10},
    },
}

NPS: Definition = {
    "code": "nps",
    "title": "Recommendation",
    "items": [
        {"link_id": "nps", "text": "How likely is it that you would recommend us to a friend?", "type": "integer"},
        {"link_id": "comment", "text": "What is the main reason for your answer?", "type": "text"},
    ],
    "scoring": {
        "method": "sum",
        "items": ["nps"],
        "minimum": 0,
        "maximum": 10,
        "bands": _bands(detractor=0, passive=7, promoter=9),
        "bad": {"at_most": 6},
    },
}

CSAT: Definition = {
    "code": "csat",
    "title": "Satisfaction",
    "items": [
        {"link_id": "csat", "text": "How satisfied were you with your visit? (1 to 5)", "type": "integer"},
        {"link_id": "comment", "text": "Is there anything that you would like us to know?", "type": "text"},
    ],
    "scoring": {
        "method": "mean",
        "items": ["csat"],
        "minimum": 1,
        "maximum": 5,
        "bands": _bands(dissatisfied=1, neutral=3, satisfied=4),
        "bad": {"at_most": 2},
    },
}

INSTRUMENTS = {definition["code"]: definition for definition in (PHQ_2, PHQ_9, GAD_7, NPS, CSAT)}


def as_questionnaire(code: str) -> Definition:
    """A shipped instrument in the form of `care.feedback.v1.Questionnaire`, English, sent only where asked for.

    PHQ-9 has no `crisis_help` yet: which help a health system offers is for it to say.
    """
    definition = INSTRUMENTS[code]
    rules = definition["scoring"]
    bad = rules["bad"]
    return {
        "name": code,
        "number": 1,
        "title": {"en": definition["title"]},
        "items": [_item(item, rules) for item in definition["items"]],
        "scoring": {
            "method": code,
            "link_ids": list(rules["items"]),
            "bad_at": bad.get("at_least", bad.get("at_most")),
        },
    }


def _item(item: Definition, rules: Definition) -> Definition:
    built = {
        "link_id": item["link_id"],
        "text": {"en": item["text"]},
        "kind": {"choice": "CHOICE", "integer": "SCALE", "text": "TEXT"}[item["type"]],
        "required": item["type"] == "integer",
    }
    if item["type"] == "choice":
        built["options"] = [{"value": option["score"], "text": {"en": option["text"]}} for option in item["options"]]
    elif item["type"] == "integer":
        built["options"] = [{"value": rules["minimum"]}, {"value": rules["maximum"]}]
    for rule in rules.get("critical", ()):
        if rule["link_id"] == item["link_id"]:
            built["critical_from"] = rule["above"] + 1
    return built
