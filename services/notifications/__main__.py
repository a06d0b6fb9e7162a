"""Runs the notifications service: `python -m services.notifications [migrate]`."""

from chassis.main import run
from services.notifications.service import SERVICE

if __name__ == "__main__":
    run(SERVICE)
