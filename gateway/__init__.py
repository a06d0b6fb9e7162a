"""The HTTP edge: transcoding of the protos, aggregates over services, OpenAPI and the pages behind links."""
