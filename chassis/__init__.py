"""What every service shares and no word of the domain: request, telling, consuming, identity, telemetry."""
