"""What a deployment may set about surveys; a tenant's policy "survey" goes before it."""

from chassis.settings import Settings


class SurveySettings(Settings):
    """Settings of the feedback service. Times are in seconds."""

    survey_delay: float = 2 * 3600
    """From the end of a visit until its survey is sent: so long a slip of the finger can be taken back."""
    survey_expiry: float = 14 * 86400
    """How long a survey can be answered."""
    survey_pause: float = 30 * 86400
    """Between two surveys to one recipient there is at least so much time."""
