"""The page on the architecture says what the code does."""

from tools.architecture import PAGE, edges, rewritten


def test_the_drawn_parts_of_the_architecture_page_are_those_of_the_code():
    page = PAGE.read_text()
    assert rewritten(page) == page, "run: python tools/architecture.py"


def test_appointments_move_referrals_reminders_surveys_and_tasks():
    found = edges()
    for hearer in ("referrals", "notifications", "feedback", "patients"):
        assert any(event.startswith("appointment.") for event in found["scheduling", hearer])
