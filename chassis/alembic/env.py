"""Alembic's environment for every service: runs on the connection that `chassis.migrations` hands over."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=context.config.attributes.get("metadata"), compare_type=True)
context.run_migrations()
