{{/* A pod, for a workload or its migration. Argument: dict root, name, service, databaseSecret, migrates. */}}
{{- define "care.pod" -}}
{{- $kafkaFiles := and .service.kafka .root.Values.kafka.tls.enabled .root.Values.kafka.tls.existingSecret -}}
metadata:
  labels:
    {{- include "care.labels" (dict "root" .root "name" (ternary (printf "%s-migrations" .name) .name .migrates)) | nindent 4 }}
  {{- with merge (dict) (default dict .service.podAnnotations) .root.Values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if .migrates }}
  restartPolicy: Never
  {{- else }}
  serviceAccountName: {{ include "care.fullname" .root }}-{{ .name }}
  terminationGracePeriodSeconds: {{ .root.Values.shutdown.terminationGracePeriodSeconds }}
  {{- if .root.Values.topologySpread.enabled }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector: {matchLabels: {{ include "care.selector" $ | fromYaml | toJson }}}
      matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
  {{- end }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with .root.Values.global.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with default .root.Values.priorityClassName .service.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- range $key := list "nodeSelector" "tolerations" "affinity" }}
  {{- with index $.root.Values $key }}
  {{ $key }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml .root.Values.podSecurityContext | nindent 4 }}
  containers:
    - name: {{ ternary "migrate" .name .migrates }}
      image: {{ include "care.image" . | quote }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- if .migrates }}
      args: [migrate]
      {{- end }}
      securityContext:
        {{- include "care.securityContext" . | nindent 8 }}
      env:
        {{- include "care.env" . | nindent 8 }}
      {{- if .migrates }}
      resources:
        {{- toYaml .root.Values.migrations.resources | nindent 8 }}
      {{- else }}
      ports:
        {{- if eq .service.kind "grpc" }}
        - {name: grpc, containerPort: 50051}
        - {name: health, containerPort: 50052}
        {{- else }}
        - {name: http, containerPort: 8080}
        {{- end }}
        - {name: metrics, containerPort: 9464}
      {{- $live := ternary (dict "grpc" (dict "port" 50052 "service" "live")) (dict "httpGet" (dict "path" "/healthz" "port" "http")) (eq .service.kind "grpc") }}
      {{- $ready := ternary (dict "grpc" (dict "port" 50052)) (dict "httpGet" (dict "path" "/readyz" "port" "http")) (eq .service.kind "grpc") }}
      startupProbe:
        {{- merge (dict) $live .root.Values.probes.startup | toYaml | nindent 8 }}
      livenessProbe:
        {{- merge (dict) $live .root.Values.probes.liveness | toYaml | nindent 8 }}
      readinessProbe:
        {{- merge (dict) $ready .root.Values.probes.readiness | toYaml | nindent 8 }}
      lifecycle:
        preStop: {sleep: {seconds: {{ .root.Values.shutdown.preStopSeconds }}}}
      resources:
        {{- toYaml .service.resources | nindent 8 }}
      {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        {{- if not .migrates }}
        - {name: keys, mountPath: /etc/care/keys, readOnly: true}
        {{- if $kafkaFiles }}
        - {name: kafka-tls, mountPath: /etc/care/kafka, readOnly: true}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {sizeLimit: 64Mi}
    {{- if not .migrates }}
    - name: keys
      projected:
        # 0440: the group is the pod's fsGroup.
        defaultMode: 288
        sources:
          - secret: {name: {{ .root.Values.serviceKeys.existingSecret }}, items: [{key: services.jwks, path: services.jwks}]}
          - secret:
              name: {{ .root.Values.serviceKeys.existingSecretPrefix }}{{ .name }}
              items: [{key: service.jwk, path: service.jwk}]
    {{- if $kafkaFiles }}
    - name: kafka-tls
      secret: {secretName: {{ .root.Values.kafka.tls.existingSecret }}, defaultMode: 288}
    {{- end }}
    {{- end }}
{{- end }}

{{/* Everything of one workload. Argument: dict root, name, service. */}}
{{- define "care.workload" -}}
{{- $fullname := printf "%s-%s" (include "care.fullname" .root) .name }}
{{- $secret := "" }}{{ with .service.database }}{{ $secret = .existingSecret }}{{ end }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "care.labels" . | nindent 4 }}
  {{- with .root.Values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "care.labels" . | nindent 4 }}
spec:
  {{- if eq .service.kind "grpc" }}
  # Headless: gRPC clients balance over the pods themselves (round_robin), a virtual address would pin them to one.
  clusterIP: None
  {{- end }}
  selector:
    {{- include "care.selector" . | nindent 4 }}
  ports:
    {{- if eq .service.kind "grpc" }}
    - {name: grpc, port: 50051, targetPort: grpc, appProtocol: kubernetes.io/h2c}
    {{- else }}
    - {name: http, port: 80, targetPort: http, appProtocol: http}
    {{- end }}
    - {name: metrics, port: 9464, targetPort: metrics}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "care.labels" . | nindent 4 }}
spec:
  replicas: {{ .service.replicas }}
  revisionHistoryLimit: 5
  strategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 0, maxSurge: 25%}}
  selector:
    matchLabels:
      {{- include "care.selector" . | nindent 6 }}
  template:
    {{- include "care.pod" (merge (dict "databaseSecret" $secret "migrates" false) .) | nindent 4 }}
{{- if and .root.Values.podDisruptionBudget.enabled (gt (int .service.replicas) 1) }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $fullname }}
  labels:
    {{- include "care.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .root.Values.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "care.selector" . | nindent 6 }}
{{- end }}
{{- end }}
