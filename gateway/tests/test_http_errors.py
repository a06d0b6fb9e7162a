"""Every reason of the services has its HTTP status on purpose, and the document lists it."""

import ast
from pathlib import Path

from chassis.errors import FailedPrecondition
from gateway.codec import Codec
from gateway.contract import rpcs
from gateway.http_errors import BY_REASON, CONFLICTS, http_status
from gateway.openapi import document
from gateway.transcoding import Routes

ROOT = Path(__file__).parents[2]


def _raised() -> set[str]:
    """Reasons with which the code makes a FailedPrecondition."""
    found = set()
    for path in [*ROOT.glob("services/*/*.py"), *ROOT.glob("chassis/**/*.py")]:
        if "tests" in path.parts or "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FailedPrecondition":
                reason = node.args[0]
                assert isinstance(reason, ast.Constant), f"{path}:{node.lineno}: a reason is a constant"
                found.add(str(reason.value))
    return found


def test_every_failed_precondition_has_its_status_decided() -> None:
    raised = _raised()
    assert {"HOLD_EXPIRED", "ETAG_REQUIRED", "LINK_EXPIRED"} <= raised
    assert raised - BY_REASON.keys() - CONFLICTS == set()
    assert CONFLICTS - raised == set(), "no longer raised"


def test_what_conflicts_with_a_state_or_a_time_is_409() -> None:
    for reason in ("HOLD_EXPIRED", "OFFER_EXPIRED", "OUTSIDE_HOURS", "TOO_EARLY", "NOT_CLINIC_DAY", "PATIENT_DECEASED"):
        assert http_status(FailedPrecondition(reason, "x"), if_match=False) == 409


def test_the_document_lists_the_reasons_by_status() -> None:
    responses = document(Routes(Codec(), rpcs()).all, version="1")["components"]["responses"]
    for reason in CONFLICTS:
        assert f"`{reason}`" in responses["Error409"]["description"]
    for reason, status in BY_REASON.items():
        assert f"`{reason}`" in responses[f"Error{status}"]["description"]
