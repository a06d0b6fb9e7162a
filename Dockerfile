# One image per workload: chassis, generated code and its own service (or the gateway), nothing of the others.
#   make image SERVICE=scheduling [BASE=...] [FLAGS=...]
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY requirements-runtime.lock /src/
RUN python3 -m venv /app/venv \
 && /app/venv/bin/pip install --quiet --disable-pip-version-check --no-cache-dir --require-hashes --only-binary :all: \
      -r /src/requirements-runtime.lock \
 && /app/venv/bin/pip uninstall --quiet --yes pip setuptools
COPY . /src/
ARG SERVICE
# .dockerignore has already left out tests and caches.
RUN test -n "$SERVICE" \
 && cp -r /src/chassis /src/gen /src/LICENSE /app/ \
 && if [ "$SERVICE" = gateway ]; then cp -r /src/gateway /app/; \
    else mkdir /app/services && cp /src/services/__init__.py /app/services/ && cp -r "/src/services/$SERVICE" /app/services/; fi \
 && /app/venv/bin/python -m compileall -q -x '^/app/venv' /app

FROM ${BASE}
ARG SERVICE
LABEL org.opencontainers.image.title="care-${SERVICE}" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /app /app
ENV PATH=/app/venv/bin:$PATH \
    PYTHONPATH=/app:/app/gen \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    SERVICE=${SERVICE}
WORKDIR /app
# No name for it: Kubernetes wants a number to see that it isn't root.
USER 10001:10001
# services: gRPC, health, metrics; gateway: HTTP, metrics
EXPOSE 50051 50052 8080 9464
ENTRYPOINT ["/bin/sh", "-c", "case $SERVICE in gateway) module=gateway;; *) module=services.$SERVICE;; esac; exec python -m $module \"$@\"", "care"]
