"""Runs the patients service: `python -m services.patients [migrate]`."""

from chassis.main import run
from services.patients.bootstrap import ship_permissions
from services.patients.service import SERVICE

if __name__ == "__main__":
    run(SERVICE, ship_permissions)
