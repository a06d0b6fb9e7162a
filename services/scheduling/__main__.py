"""Runs the scheduling service: `python -m services.scheduling [migrate]`."""

from chassis.main import run
from services.scheduling.service import SERVICE

if __name__ == "__main__":
    run(SERVICE)
