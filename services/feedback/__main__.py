"""Runs the feedback service: `python -m services.feedback [migrate]`."""

from chassis.main import run
from services.feedback.service import SERVICE

if __name__ == "__main__":
    run(SERVICE)
