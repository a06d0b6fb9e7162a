"""Runs the referrals service: `python -m services.referrals [migrate]`."""

from chassis.main import run
from services.referrals.service import SERVICE

if __name__ == "__main__":
    run(SERVICE)
