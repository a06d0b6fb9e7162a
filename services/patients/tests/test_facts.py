"""What rules of eligibility hear of a patient."""

import pytest

from services.patients.facts import facts, home_state


@pytest.mark.parametrize(
    ("addresses", "state"),
    [
        ([{"use": "HOME", "state": "Massachusetts"}], "MA"),
        ([{"state": " ma "}], "MA"),
        ([{"use": "WORK", "state": "NH"}], ""),
        (
            [
                {"use": "OLD", "state": "NH"},
                {"use": "TEMP", "state": "ME"},
                {"use": "HOME", "state": "District of  Columbia"},
            ],
            "DC",
        ),
        ([{"use": "HOME", "state": "Ontario"}, {"use": "TEMP", "state": "VT"}], "VT"),
        ([], ""),
    ],
)
def test_a_home_state_is_two_letters_however_it_was_written(addresses, state):
    assert home_state(addresses) == state


def test_what_is_not_known_is_empty():
    assert facts("CODE_UNSPECIFIED", "", []) == {"birth_date": "", "sex": "", "state": ""}
    assert facts("FEMALE", "1990-05", [])["sex"] == "female"
