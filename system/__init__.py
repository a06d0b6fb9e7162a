"""The whole on one machine: embedded PostgreSQL and Kafka, the embedded run and the command line."""
