"""Commands explain themselves and say plainly what is missing."""

import base64
import json

import pytest
from typer.testing import CliRunner

from system import mailbox
from system.cli import app
from system.issuer import ISSUER
from system.keys import Keys

COMMANDS = (
    "up",
    "token",
    "serve",
    "migrate",
    "mailbox",
    "replay",
    "audit",
    "audit verify",
    "waitlist",
    "waitlist run",
    "doctor",
    "import",
)


@pytest.fixture
def care(tmp_path, monkeypatch):
    for name in ("CARE_DATA", "CARE_ENVIRONMENT", "CARE_DATABASE_URL", "CARE_URL", "CARE_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def data(tmp_path):
    Keys(tmp_path / ".care" / "keys").ensure()
    return tmp_path / ".care"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(care, command):
    answer = care(*command.split(), "--help")
    assert answer.exit_code == 0
    assert "Usage:" in answer.output and len(answer.output.splitlines()) > 5


def test_a_token_needs_a_folder_with_keys(care):
    answer = care("token", "--role", "nurse")
    assert answer.exit_code == 1
    assert "care up" in answer.stderr and answer.stdout == ""


def test_a_token_goes_to_stdout_and_the_warning_to_stderr(care, data):
    answer = care("token", "--role", "nurse")
    assert answer.exit_code == 0
    assert answer.stdout.count(".") == 2 and len(answer.stdout.split()) == 1
    assert "never for real patients" in answer.stderr
    claims = json.loads(base64.urlsafe_b64decode(answer.stdout.split(".")[1] + "=="))
    assert (claims["iss"], claims["sub"]) == (ISSUER, "nurse@sample")


@pytest.mark.parametrize("wrong", [(), ("--role", "king"), ("--role", "nurse", "--patient", "1")])
def test_a_token_is_for_one_role_or_one_patient(care, data, wrong):
    answer = care("token", *wrong)
    assert answer.exit_code == 2 and "coordinator" in answer.stderr


def test_a_patients_token_needs_the_running_system(care, data):
    answer = care("token", "--patient", "019a0000-0000-7000-8000-000000000001")
    assert answer.exit_code == 1 and "care up" in answer.stderr


def test_no_token_and_no_system_in_production(care, data, monkeypatch):
    monkeypatch.setenv("CARE_ENVIRONMENT", "production")
    for command in (("token", "--role", "nurse"), ("up", "--port", "0")):
        answer = care(*command)
        assert answer.exit_code == 1 and "production" in answer.stderr


def test_the_mailbox_is_printed_to_people_and_to_programs(care, data):
    assert "no mailbox" in care("mailbox").stderr
    box = mailbox.Mailbox(data)
    box.file.touch()
    box.keep(mailbox.Letter("1", "2026-11-24T12:00:00+00:00", "sms", "+18005550199", "+15185550110", "See you"))
    assert "SMS to +15185550110" in care("mailbox").stdout
    assert json.loads(care("mailbox", "--json").stdout)["text"] == "See you"


@pytest.mark.parametrize(
    "command", ["replay patients", "waitlist run --dry-run", "audit verify", "audit verify patients", "doctor"]
)
def test_what_needs_a_running_system_says_so(care, command):
    answer = care(*command.split())
    assert answer.exit_code == 2 and "care up" in answer.stderr


@pytest.mark.parametrize("command", ["serve", "migrate", "replay", "audit verify", "doctor"])
def test_a_name_that_is_none_is_refused_with_the_names(care, command):
    answer = care(*command.split(), "billing")
    assert answer.exit_code == 2
