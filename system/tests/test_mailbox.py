"""The mailbox over real SMTP and HTTP, with its faults."""

import asyncio
import stat
import time
from email.message import EmailMessage

import aiosmtplib
import httpx2
import pytest
import pytest_asyncio

from system.mailbox import ACCOUNT, PAGE, Letters, Mailbox, page

MESSAGES = f"/2010-04-01/Accounts/{ACCOUNT}/Messages.json"
SMS = {"To": "+16175550101", "From": "+18005550199", "Body": "See you at 10:30 — ¿sí?"}


@pytest_asyncio.fixture(loop_scope="session")
async def mailbox(tmp_path):
    box = Mailbox(tmp_path)
    await box.start()
    yield box
    await box.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def provider(mailbox):
    async with httpx2.AsyncClient(base_url=mailbox.sms_url, auth=(ACCOUNT, mailbox.token), timeout=5) as client:
        yield client


def mail(to="ana@example.org", text="Your visit: http://127.0.0.1:8080/p/abc\n"):
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "care@example.org", to, "Your visit – reminder"
    message.set_content(text)
    message.add_alternative("<p>Your visit</p>", subtype="html")
    return message


async def send(mailbox, message, timeout=5):
    return await aiosmtplib.send(message, hostname="127.0.0.1", port=mailbox.smtp_port, timeout=timeout)


async def test_a_message_by_smtp_arrives_with_subject_and_both_bodies(mailbox):
    await send(mailbox, mail())
    (letter,) = mailbox.letters.read()
    assert (letter.channel, letter.recipient, letter.subject) == ("email", "ana@example.org", "Your visit – reminder")
    assert letter.text.startswith("Your visit: http://") and letter.html == "<p>Your visit</p>\n"


async def test_an_sms_is_answered_as_the_large_providers_do_and_can_be_listed(provider):
    made = await provider.post(MESSAGES, data=SMS)
    assert made.status_code == 201
    assert made.json()["status"] == "queued" and made.json()["sid"].startswith("SM")
    await provider.post(MESSAGES, data={**SMS, "To": "+16175550102"})
    today = time.strftime("%Y-%m-%d", time.gmtime())
    listed = (await provider.get(MESSAGES, params={"To": SMS["To"], "DateSent>": today})).json()["messages"]
    assert [(each["sid"], each["body"]) for each in listed] == [(made.json()["sid"], SMS["Body"])]
    for never in ({"DateSent<": "2020-01-01"}, {"DateSent>": "2099-01-01T00:00:00Z"}):
        assert (await provider.get(MESSAGES, params=never)).json()["messages"] == []
    await asyncio.sleep(0.1)
    one = await provider.get(MESSAGES.replace(".json", f"/{made.json()['sid']}.json"))
    assert one.json()["status"] == "delivered"


async def test_the_provider_refuses_a_wrong_password_and_a_wrong_number(mailbox, provider):
    async with httpx2.AsyncClient(base_url=mailbox.sms_url, auth=(ACCOUNT, "wrong")) as stranger:
        assert (await stranger.post(MESSAGES, data=SMS)).status_code == 401
    bad = await provider.post(MESSAGES, data={**SMS, "To": "617-555-0101"})
    assert (bad.status_code, bad.json()["code"]) == (400, 21211)
    assert (await provider.post(MESSAGES, data={"To": SMS["To"]})).status_code == 400
    assert mailbox.letters.read() == []


async def test_the_callback_is_told_of_the_delivery(mailbox, provider):
    heard = asyncio.get_running_loop().create_future()

    async def listen(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(
            int(each.split(b":")[1]) for each in head.lower().split(b"\r\n") if each.startswith(b"content-length")
        )
        heard.set_result(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = await provider.post(MESSAGES, data={**SMS, "StatusCallback": f"http://127.0.0.1:{port}/status/m1"})
    told = await asyncio.wait_for(heard, 3)
    assert f"MessageSid={made.json()['sid']}".encode() in told and b"MessageStatus=delivered" in told
    server.close()


async def test_faults_hit_the_next_calls_only(mailbox, provider):
    mailbox.fail("sms", "429")
    mailbox.fail("sms", "500")
    codes = [(await provider.post(MESSAGES, data=SMS)).status_code for _ in range(3)]
    assert codes == [429, 500, 201]
    switched = await provider.post("/dev/faults", json={"channel": "email", "fault": "429", "count": 1})
    assert switched.status_code == 204
    with pytest.raises(aiosmtplib.SMTPDataError) as refused:
        await send(mailbox, mail())
    assert refused.value.code == 451
    await send(mailbox, mail())
    assert (await provider.post("/dev/faults", json={"channel": "fax"})).status_code == 400


async def test_a_call_may_be_taken_in_and_never_answered_in_time(mailbox, provider):
    mailbox.fail("sms", "timeout", seconds=3)
    with pytest.raises(httpx2.ReadTimeout):
        await provider.post(MESSAGES, data=SMS, timeout=0.3)
    listed = (await provider.get(MESSAGES, params={"To": SMS["To"]})).json()["messages"]
    assert len(listed) == 1, "it did arrive, and the sender can't know but by listing"
    mailbox.fail("sms", "slow", seconds=0.3)
    began = time.monotonic()
    assert (await provider.post(MESSAGES, data=SMS)).status_code == 201
    assert time.monotonic() - began >= 0.3


async def test_the_page_shows_messages_to_people_and_to_programs(mailbox):
    await send(mailbox, mail(text="<b>bold</b> http://127.0.0.1:8080/p/abc"))
    transport = httpx2.ASGITransport(app=page(mailbox.file))
    async with httpx2.AsyncClient(transport=transport, base_url="http://care") as client:
        machine = (await client.get(PAGE)).json()["messages"]
        human = await client.get(PAGE, headers={"accept": "text/html"})
    assert [each["recipient"] for each in machine] == ["ana@example.org"]
    assert "&lt;b&gt;bold" in human.text and '<a href="http://127.0.0.1:8080/p/abc">' in human.text
    assert human.headers["cache-control"] == "no-store"


async def test_messages_are_still_there_after_a_restart_on_the_same_ports(tmp_path):
    box = Mailbox(tmp_path)
    await box.start()
    ports = box.smtp_port, box.http_port
    await send(box, mail())
    await box.stop()
    with box.file.open("ab") as file:
        file.write(b'{"id": "torn')  # a process that was killed
    box = Mailbox(tmp_path, smtp_port=ports[0], http_port=ports[1])
    await box.start()
    assert (box.smtp_port, box.http_port) == ports
    await box.stop()
    assert len(Letters(box.file).read()) == 1
    assert stat.S_IMODE(box.file.stat().st_mode) == 0o600
