"""What patients does on others' events."""

from chassis.reactions import Reactions

reactions = Reactions()
