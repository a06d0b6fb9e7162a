"""Each way in which a call of a provider can end."""

import asyncio
import socket

import pytest

from services.notifications.providers import HttpSms, Parcel, Smtp
from services.notifications.settings import NotificationsSettings
from services.notifications.tests.conftest import MailServer, SmsProvider

TEXT = Parcel("0198f000-0000-7000-8000-000000000001", "+16175550123", "", "Hello")
LETTER = Parcel("0198f000-0000-7000-8000-000000000002", "p@mail.test", "Your visit", "Sí, señora\n")


def settings(**values):
    base = {"sms_account": "AC", "sms_token": "t", "sms_from": "+18005550199", "smtp_from": "Care <care@clinic.test>"}
    return NotificationsSettings(**{**base, "provider_timeout": 0.5, **values})


def yes():
    return True


def no():
    return False


@pytest.fixture
async def sms():
    provider = SmsProvider()
    await provider.start()
    yield provider
    await provider.stop()


@pytest.fixture
async def mail():
    server = MailServer()
    await server.start()
    yield server
    await server.stop()


def nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (None, "accepted", ""),
        (400, "refused", "21211"),
        (422, "refused", "20422"),
        (401, "failed", "20401"),
        (429, "failed", "20429"),
        (500, "failed", "20500"),
        (503, "failed", "20503"),
        (502, "unknown", "20502"),
        (504, "unknown", "20504"),
        (("slow", 0.9), "unknown", "ReadTimeout"),
    ],
)
async def test_what_the_sms_provider_answers_is_judged(sms, fault, kind, code):
    client = HttpSms(settings(sms_url=sms.url))
    sms.faults.append(fault)
    outcome = await client.send(TEXT, yes)
    assert (outcome.kind, outcome.error_code) == (kind, code)
    await client.close()


async def test_only_a_receiver_that_was_set_is_told_to_the_provider(sms):
    for set_to, told in (("", None), ("https://hook.test/sms/", "https://hook.test/sms/m-1")):
        client = HttpSms(settings(sms_url=sms.url, sms_callback_url=set_to, link_base_url="http://care.test"))
        assert (await client.send(TEXT._replace(message_id="m-1"), yes)).kind == "accepted"
        assert sms.calls[-1][1].get("StatusCallback") == told
        await client.close()


async def test_a_provider_that_cannot_be_reached_has_surely_not_taken_it():
    port = nobody_there()
    sms, mail = (
        HttpSms(settings(sms_url=f"http://127.0.0.1:{port}")),
        Smtp(settings(smtp_url=f"smtp://127.0.0.1:{port}")),
    )
    assert (await sms.send(TEXT, yes)).kind == "failed"
    assert (await mail.send(LETTER, yes)).kind == "failed"
    await sms.close()


async def test_a_connection_that_breaks_after_the_request_leaves_it_unknown():
    async def hang_up(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    client = HttpSms(settings(sms_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    assert (await client.send(TEXT, yes)).kind == "unknown"
    await client.close()
    server.close()


async def test_a_call_whose_check_is_too_old_is_not_begun(sms, mail):
    texts, letters = HttpSms(settings(sms_url=sms.url)), Smtp(settings(smtp_url=mail.url))
    assert (await texts.send(TEXT, no)).kind == "stale" and not sms.calls
    assert (await letters.send(LETTER, no)).kind == "stale" and not mail.letters
    assert (await texts.send(TEXT, yes)).kind == "accepted"
    assert (await letters.send(LETTER, yes)).kind == "accepted"
    await texts.close()
    await letters.close()


async def test_letters_share_a_connection_and_find_a_new_one_when_it_is_gone(mail):
    client = Smtp(settings(smtp_url=mail.url))
    for _ in range(3):
        outcome = await client.send(LETTER, yes)
        assert outcome == ("accepted", "", f"<{LETTER.message_id}@clinic.test>", 0.0)
    assert len(client._idle) == 1
    client._idle[0][1].transport.abort()
    await asyncio.sleep(0.05)
    assert (await client.send(LETTER, yes)).kind == "accepted"
    assert [letter.get_content() for letter in mail.letters] == ["Sí, señora\r\n"] * 4
    await client.close()


@pytest.mark.parametrize(
    ("to", "reply", "kind", "code"),
    [
        ("nobody@mail.test", None, "refused", "smtp-550"),
        ("p@mail.test", "554 no", "refused", "smtp-554"),
        ("p@mail.test", "451 later", "failed", "smtp-451"),
        ("p@mail.test\nBcc: x@y.z", None, "refused", "address-invalid"),
    ],
)
async def test_what_the_mail_server_answers_is_judged(mail, to, reply, kind, code):
    client = Smtp(settings(smtp_url=mail.url))
    if reply:
        mail.faults.append(reply)
    outcome = await client.send(LETTER._replace(to=to), yes)
    assert (outcome.kind, outcome.error_code) == (kind, code)
    await client.close()


async def test_a_mail_server_that_falls_silent_after_the_letter_leaves_it_unknown():
    async def silent(reader, writer):
        writer.write(b"220 mail.test\r\n")
        while line := await reader.readline():
            if line == b".\r\n":
                await asyncio.sleep(2)
            elif line.startswith(b"EHLO"):
                writer.write(b"250 mail.test\r\n")
            elif line.startswith(b"DATA"):
                writer.write(b"354 go\r\n")
            elif line.startswith((b"MAIL", b"RCPT")):
                writer.write(b"250 ok\r\n")

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    client = Smtp(settings(smtp_url=f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    assert (await client.send(LETTER, yes)).kind == "unknown"
    await client.close()
    server.close()


def test_the_shipped_bounds_keep_the_second_that_the_rules_grant():
    shipped = NotificationsSettings()
    assert shipped.check_timeout < shipped.check_age < 1.0
    assert shipped.send_lease > 2 * shipped.provider_timeout
    # A question names at most 200 recipients, each message has up to three channels.
    assert shipped.send_batch * 3 <= 200
