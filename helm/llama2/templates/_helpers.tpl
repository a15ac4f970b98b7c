{{/* Names and labels. */}}
{{- define "llama2.appName" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end -}}

{{/*
At most 44 characters, so that suffixes fit into 63. A longer name ends in a digest, or two releases could collide. A
Service's name cannot start with a digit, as a release's can.
*/}}
{{- define "llama2.name" -}}
{{- $app := include "llama2.appName" . -}}
{{- $name := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-%s" .Release.Name $app) (contains $app .Release.Name)) -}}
{{- if not (regexMatch "^[a-z]" $name) -}}{{- $name = printf "release-%s" $name -}}{{- end -}}
{{- if gt (len $name) 44 -}}
{{- printf "%s-%s" ($name | trunc 35 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{- define "llama2.selector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: server
{{- end -}}

{{/* All pods of the release. */}}
{{- define "llama2.releaseSelector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "llama2.forwardSelector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: usage-forward
{{- end -}}

{{- define "llama2.downloadSelector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: weights-download
{{- end -}}

{{- define "llama2.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
{{- with omit .Values.commonLabels "helm.sh/chart" "app.kubernetes.io/version" "app.kubernetes.io/managed-by" "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The annotations of a manifest: commonAnnotations, and the manifest's own, which win. Argument: (list $ own). */}}
{{- define "llama2.annotations" -}}
{{- $all := merge (dict) (index . 1) (index . 0).Values.commonAnnotations -}}
{{- if $all }}
annotations: {{- toYaml $all | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "llama2.labels" -}}
{{ include "llama2.commonLabels" . }}
{{ include "llama2.selector" . }}
{{- end -}}

{{- define "llama2.serviceAccount" -}}
{{- default (ternary (include "llama2.name" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "llama2.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values derived from the card and the chart's values, for all templates. */}}
{{- define "llama2.derived" -}}
{{- $v := .Values -}}
{{- $replicas := ternary $v.autoscaling.maxReplicas $v.replicas $v.autoscaling.enabled | int -}}
{{- $limits := include "llama2.limits" . | fromYaml -}}
{{- $maxGenerationSeconds := mulf $limits.contextLength $v.slowestTokenSeconds | ceil | int -}}
{{- $hubDirectory := printf "%s%s" $v.weights.hubId (ternary (printf "@%s" $v.weights.revision) "" (not (empty $v.weights.revision))) | replace "/" "--" -}}
{{- $workload := $v.workload | default (ternary "Deployment" "StatefulSet" (or $v.demo (eq $v.quotas "perReplica"))) -}}
{{- $ownClaim := and (eq $workload "Deployment") (not $v.demo) (not $v.usage.secret) (eq $replicas 1) -}}
{{- $persistentData := or (not (empty $v.data.existingClaim)) $ownClaim -}}
{{- $createWeightsClaim := and (not $v.demo) (not (empty $v.weights.hubId)) (not $v.weights.existingClaim) -}}
{{- $downloadJob := and (not $v.demo) (not (empty $v.weights.hubId)) (eq $v.weights.download "job") }}
name: {{ include "llama2.name" . | quote }}
workload: {{ $workload }}
maxReplicas: {{ $replicas }}
contextLength: {{ $limits.contextLength }}
{{- /* Weights, keys and values of every slot, and 1 GiB for Python, its libraries and the requests. */}}
memoryBytes: {{ add (int64 $v.weights.bytes) (mul $limits.slots $limits.contextLength (int64 $v.weights.keyValueBytesPerToken)) 1073741824 | quote }}
{{- /* The device plugin's MIG resources share the taint of the whole GPU. */}}
gpuTaint: {{ ternary "nvidia.com/gpu" $v.gpu.resource (hasPrefix "nvidia.com/mig-" $v.gpu.resource) | quote }}
gpus: {{ ternary (ternary 0 1 $v.demo) ($v.gpu.count | int) (kindIs "invalid" $v.gpu.count) }}
unauthenticated: {{ and (not $v.apiKeys.secret) (or $v.demo $v.allowUnauthenticated) }}
weights: {{ ternary "" (printf "/weights/%s" (ternary $v.weights.directory $hubDirectory (empty $v.weights.hubId)) | trimSuffix "/") $v.demo | quote }}
createWeightsClaim: {{ $createWeightsClaim }}
downloadJob: {{ $downloadJob }}
persistentData: {{ $persistentData }}
createDataClaim: {{ and $persistentData (not $v.data.existingClaim) }}
recreate: {{ or $persistentData (and $createWeightsClaim (hasPrefix "ReadWriteOnce" $v.weights.accessMode)) }}
maxGenerationSeconds: {{ $maxGenerationSeconds }}
terminationGraceSeconds: {{ add $v.drain.preStopSeconds $maxGenerationSeconds $v.drain.flushSeconds }}
{{- /* A request may arrive just before its connection ends, wait in the queue and then generate; 60 s is a margin. */}}
connectionAgeGraceSeconds: {{ add ($v.settings.queue_timeout_seconds | default 300 | ceil | int) $maxGenerationSeconds 60 }}
connectsOut: {{ or (not (empty (cat (ternary "" $v.weights.hubId $downloadJob) $v.redis.secret $v.usage.secret ($v.settings.otlp_endpoint | default "") | trim))) false }}
testable: {{ and $v.test.enabled (or (not $v.apiKeys.secret) (not (empty $v.test.apiKey.secret))) (or (not $v.tls.clientCaSecret) (not (empty $v.test.clientSecret))) }}
{{- end -}}

{{/* A surge needs a spare GPU for its duration, so pods with a GPU are replaced one by one unless the values ask for a surge. */}}
{{- define "llama2.rollingUpdate" -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- $v := .Values.rollingUpdate -}}
{{- $gpu := gt (int $d.gpus) 0 -}}
maxSurge: {{ ternary (ternary 0 1 $gpu) $v.maxSurge (kindIs "invalid" $v.maxSurge) }}
maxUnavailable: {{ ternary (ternary 1 0 $gpu) $v.maxUnavailable (kindIs "invalid" $v.maxUnavailable) }}
{{- end -}}

{{/*
Peers that may call the pods of a Service, in a NetworkPolicy. Clients of a LoadBalancer or NodePort come from outside of the
cluster, or with a node's address. Argument: (list $ service labels); labels select pods of the release that always may call.
*/}}
{{- define "llama2.clients" -}}
{{- $clients := (index . 0).Values.networkPolicy.clients -}}
{{- $service := index . 1 -}}
{{- $external := ne $service.type "ClusterIP" -}}
{{- if or $clients (not $external) $service.loadBalancerSourceRanges }}
from:
  {{- if $clients }}
  {{- toYaml $clients | nindent 2 }}
  {{- else }}
  - podSelector: {}
  {{- end }}
  {{- if and $external (not $clients) }}
  {{- range $service.loadBalancerSourceRanges }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
  {{- end }}
  {{- if $clients }}
  {{- range index . 2 }}
  - podSelector:
      matchLabels: {{- toYaml . | nindent 8 }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The spec of a claim for the data directory. */}}
{{- define "llama2.dataClaim" -}}
accessModes: [ReadWriteOnce]
{{- with include "llama2.storageClass" .Values.data.storageClass }}
{{ . }}
{{- end }}
resources: {requests: {storage: {{ .Values.data.size | quote }}}}
{{- end -}}

{{/* A storage class; "-" disables dynamic provisioning, empty selects the cluster's default. */}}
{{- define "llama2.storageClass" -}}
{{- if eq . "-" -}}storageClassName: ""{{- else if . -}}storageClassName: {{ . | quote }}{{- end -}}
{{- end -}}

{{/* Environment variables: the chart's list without the names that extraEnv defines, then extraEnv. Argument: (list $ list). */}}
{{- define "llama2.withExtraEnv" -}}
{{- $extra := (index . 0).Values.extraEnv -}}
{{- $names := list -}}
{{- range $extra -}}{{- $names = append $names .name -}}{{- end -}}
{{- range index . 1 -}}
{{- if not (has .name $names) }}
- {{ toYaml . | nindent 2 | trim }}
{{- end -}}
{{- end -}}
{{- with $extra }}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{/* A setting as text. Helm stores every number as a float and would write 16777216 as 1.6777216e+07. */}}
{{- define "llama2.settingText" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{- int64 . -}}{{- else -}}{{- . -}}{{- end -}}
{{- end -}}

{{/* The server's environment; each variable is `LLAMA2_` and the name of a setting. */}}
{{- define "llama2.env" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- $env := dict
  "LISTEN" "0.0.0.0:50051"
  "HEALTH_LISTEN" "0.0.0.0:50052"
  "METRICS_LISTEN" "0.0.0.0:9464"
  "CARD" (ternary "demo" "/etc/llama2/card/card.yaml" $v.demo)
  "DEVICE" (ternary "cuda" "cpu" (gt (int $d.gpus) 0))
  "DATA_DIRECTORY" "/data"
  "SHUTDOWN_GRACE_SECONDS" (toString $d.maxGenerationSeconds)
  "MAX_CONNECTION_AGE_GRACE_SECONDS" (toString $d.connectionAgeGraceSeconds) -}}
{{- if $d.weights -}}{{- $_ := set $env "WEIGHTS" $d.weights -}}{{- end -}}
{{- if $d.unauthenticated -}}{{- $_ := set $env "ALLOW_UNAUTHENTICATED" "true" -}}{{- end -}}
{{- if $v.apiKeys.secret -}}{{- $_ := set $env "API_KEYS_FILE" (printf "/etc/llama2/keys/%s" $v.apiKeys.key) -}}{{- end -}}
{{- if $v.receipts.secret -}}
{{- $_ := set $env "RECEIPT_KEY" (printf "/etc/llama2/receipts/%s" $v.receipts.key) -}}
{{- $_ := set $env "RECEIPT_PUBLIC_KEYS" "/etc/llama2/receipts" -}}
{{- end -}}
{{- if $v.tls.secret -}}
{{- $_ := set $env "TLS_CERTIFICATE" "/etc/llama2/tls/tls.crt" -}}
{{- $_ := set $env "TLS_KEY" "/etc/llama2/tls/tls.key" -}}
{{- end -}}
{{- if $v.tls.clientCaSecret -}}{{- $_ := set $env "TLS_CLIENT_CA" "/etc/llama2/client-ca/ca.crt" -}}{{- end -}}
{{- range $key, $value := $v.settings -}}
{{- if not (kindIs "invalid" $value) -}}{{- $_ := set $env (upper $key) (include "llama2.settingText" $value) -}}{{- end -}}
{{- end -}}
{{- range $key, $value := $env }}
- name: LLAMA2_{{ $key }}
  value: {{ $value | quote }}
{{- end }}
{{- with $v.redis.secret }}
- name: LLAMA2_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $v.redis.key | quote }}}}
{{- end }}
{{- with $v.usage.secret }}
- name: LLAMA2_USAGE_URL
  valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: {{ $v.usage.key | quote }}}}
{{- end }}
{{- include "llama2.withExtraEnv" (list . (list)) }}
{{- end -}}

{{/* CPU and memory of the server; deployment.yaml adds the GPU. */}}
{{- define "llama2.resources" -}}
{{- if .Values.resources -}}
{{- toYaml .Values.resources -}}
{{- else if .Values.demo -}}
requests: {cpu: "1", memory: 1Gi}
limits: {memory: 2Gi}
{{- else -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- $memory := printf "%dMi" (divf (int64 $d.memoryBytes) 1048576 | ceil | int64) }}
requests: {cpu: "2", memory: {{ $memory }}}
limits: {memory: {{ $memory }}}
{{- end -}}
{{- end -}}

{{/* Selector of this release's time series, by the labels that the ServiceMonitor adds. */}}
{{- define "llama2.series" -}}
namespace="{{ .Release.Namespace }}",service="{{ include "llama2.name" . }}-headless"
{{- end -}}
