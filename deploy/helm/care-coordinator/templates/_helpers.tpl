{{- define "care.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}
{{- end }}

{{/* Labels that never change over a release's life: selectors are immutable. Argument: dict root, name. */}}
{{- define "care.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{- define "care.labels" -}}
{{ include "care.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: care-coordinator
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "care.image" -}}
{{- $registry := default .root.Values.image.registry .root.Values.global.imageRegistry }}
{{- $name := printf "%s%s" .root.Values.image.prefix .name }}
{{- if $registry }}{{ $registry }}/{{ end }}{{ $name }}{{ if .service.digest }}@{{ .service.digest }}{{ else }}:{{ default .root.Chart.AppVersion .root.Values.image.tag }}{{ end }}
{{- end }}

{{- define "care.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* One environment variable from a Secret. Argument: dict name, secret, key. */}}
{{- define "care.fromSecret" -}}
- name: {{ .name }}
  valueFrom: {secretKeyRef: {name: {{ .secret }}, key: {{ .key }}}}
{{- end }}

{{/* The environment of a workload. Argument: dict root, name, service, databaseSecret, migrates (then only the database). */}}
{{- define "care.env" -}}
{{- $root := .root }}{{- $service := .service -}}
- {name: CARE_ENVIRONMENT, value: {{ $root.Values.environment | quote }}}
{{- with $service.database }}
{{ include "care.fromSecret" (dict "name" "CARE_DATABASE_URL" "secret" $.databaseSecret "key" .secretKey) }}
{{- end }}
{{- if not .migrates }}
- {name: CARE_HOST, value: 0.0.0.0}
- {name: CARE_DRAIN_TIMEOUT, value: {{ sub (int $root.Values.shutdown.terminationGracePeriodSeconds) (add 5 (int $root.Values.shutdown.preStopSeconds)) | quote }}}
{{- if $service.kafka }}
{{- $tls := $root.Values.kafka.tls }}{{ $sasl := $root.Values.kafka.sasl }}
{{- $options := dict "security_protocol" (printf "%s%s" (ternary "SASL_" "" (ne $sasl.mechanism "")) (ternary "SSL" "PLAINTEXT" $tls.enabled)) }}
{{- if and $tls.enabled $tls.existingSecret }}
{{- $_ := set $options "ssl_cafile" "/etc/care/kafka/ca.crt" }}
{{- if $tls.clientCertificate }}
{{- $_ := set $options "ssl_certfile" "/etc/care/kafka/tls.crt" }}{{ $_ := set $options "ssl_keyfile" "/etc/care/kafka/tls.key" }}
{{- end }}
{{- end }}
{{- with $sasl.mechanism }}{{ $_ := set $options "sasl_mechanism" . }}{{ end }}
- {name: CARE_KAFKA__BOOTSTRAP, value: {{ required "kafka.bootstrap is required" $root.Values.kafka.bootstrap | quote }}}
- {name: CARE_KAFKA__OPTIONS, value: {{ $options | toJson | quote }}}
{{- if $sasl.mechanism }}
{{- $secret := required "kafka.sasl.existingSecret is required with kafka.sasl.mechanism" $sasl.existingSecret }}
{{ include "care.fromSecret" (dict "name" "CARE_KAFKA__OPTIONS__SASL_PLAIN_USERNAME" "secret" $secret "key" "username") }}
{{ include "care.fromSecret" (dict "name" "CARE_KAFKA__OPTIONS__SASL_PLAIN_PASSWORD" "secret" $secret "key" "password") }}
{{- end }}
{{- end }}
{{- $peers := dict }}
{{- range $service.calls }}{{- $_ := set $peers . (printf "dns:///%s-%s.%s.svc:50051" (include "care.fullname" $root) . $root.Release.Namespace) }}{{- end }}
- {name: CARE_PEERS, value: {{ $peers | toJson | quote }}}
{{- if not $root.Values.issuers }}{{ fail "issuers is required: who signs the users' tokens, and for which tenants" }}{{ end }}
{{- $issuers := list }}
{{- range $root.Values.issuers }}
{{- $issuer := dict "issuer" .issuer "audience" (default "care" .audience) "tenant_claim" (default "tenant" .tenantClaim) "tenants" .tenants }}
{{- with .jwksUrl }}{{ $_ := set $issuer "jwks_url" . }}{{ end }}
{{- $issuers = append $issuers $issuer }}
{{- end }}
- {name: CARE_ISSUERS, value: {{ $issuers | toJson | quote }}}
- {name: CARE_SERVICE_KEYS_FILE, value: /etc/care/keys/services.jwks}
- {name: CARE_SERVICE_KEY_FILE, value: /etc/care/keys/service.jwk}
{{ include "care.fromSecret" (dict "name" "CARE_SIGNING_SECRET" "secret" $root.Values.signing.existingSecret "key" "signing-secret") }}
- {name: CARE_LINK_BASE_URL, value: {{ required "publicUrl is required" $root.Values.publicUrl | quote }}}
{{- with $root.Values.telemetry.otlpEndpoint }}
- {name: CARE_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: OTEL_RESOURCE_ATTRIBUTES
  value: {{ $attributes := list (printf "k8s.namespace.name=%s" $root.Release.Namespace) "k8s.pod.name=$(POD_NAME)" }}
    {{- range $key, $value := $root.Values.telemetry.resourceAttributes }}{{ $attributes = append $attributes (printf "%s=%s" $key $value) }}{{ end }}
    {{- join "," $attributes | quote }}
{{- end }}
{{- range $key, $value := merge (dict) (default dict $service.env) $root.Values.env }}
- {name: {{ $key }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
