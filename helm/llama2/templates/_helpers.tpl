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

{{- define "llama2.forwardSelector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: usage-forward
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

{{/* The card's text. */}}
{{- define "llama2.card" -}}
{{- if .Values.demo -}}
{{- .Files.Get "files/cards/demo.yaml" -}}
{{- else if .Values.card.content -}}
{{- .Values.card.content -}}
{{- else -}}
{{- $text := .Files.Get (printf "files/cards/%s.yaml" .Values.card.name) -}}
{{- if not $text -}}
{{- $shipped := list -}}
{{- range $path, $_ := .Files.Glob "files/cards/*.yaml" -}}{{- $shipped = append $shipped (base $path | trimSuffix ".yaml") -}}{{- end -}}
{{- fail (printf "card.name: %q does not ship with the chart (available: %s); choose one of these or set a custom card with --set-file card.content=FILE" .Values.card.name (join ", " $shipped)) -}}
{{- end -}}
{{- $text -}}
{{- end -}}
{{- end -}}

{{/* The card's context_length_limit: the maximum number of tokens of a prompt and its reply together. */}}
{{- define "llama2.contextLength" -}}
{{- $card := dict -}}
{{- range regexSplit "(?m)^---[ \\t]*$" (include "llama2.card" .) -1 -}}
{{- if and (not $card) (trim .) -}}{{- $card = fromYaml . -}}{{- end -}}
{{- end -}}
{{- if $card.Error -}}{{- fail (printf "card: not valid YAML: %s" $card.Error) -}}{{- end -}}
{{- $found := 0 -}}
{{- $model := get $card "model" -}}
{{- if kindIs "map" $model -}}
{{- range ($model.properties | default list) -}}
{{- if eq (toString .property_id) "context_length_limit" -}}{{- $found = int .value -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if lt $found 1 -}}{{- fail "card: model.properties has no positive context_length_limit; check that the file is a model card" -}}{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Values derived from the card and the chart's values, for all templates. */}}
{{- define "llama2.derived" -}}
{{- $v := .Values -}}
{{- $replicas := ternary $v.autoscaling.maxReplicas $v.replicas $v.autoscaling.enabled | int -}}
{{- $maxGenerationSeconds := mulf (include "llama2.contextLength" . | int) $v.slowestTokenSeconds | ceil | int -}}
{{- $hubDirectory := printf "%s%s" $v.weights.hubId (ternary (printf "@%s" $v.weights.revision) "" (not (empty $v.weights.revision))) | replace "/" "--" -}}
{{- $workload := $v.workload | default (ternary "Deployment" "StatefulSet" (or $v.demo (eq $v.quotas "perReplica"))) -}}
{{- $ownClaim := and (eq $workload "Deployment") (not $v.demo) (not $v.usage.secret) (eq $replicas 1) -}}
{{- $persistentData := or (not (empty $v.data.existingClaim)) $ownClaim -}}
{{- $createWeightsClaim := and (not $v.demo) (not (empty $v.weights.hubId)) (not $v.weights.existingClaim) -}}
name: {{ include "llama2.name" . | quote }}
workload: {{ $workload }}
maxReplicas: {{ $replicas }}
{{- /* The device plugin's MIG resources share the taint of the whole GPU. */}}
gpuTaint: {{ ternary "nvidia.com/gpu" $v.gpu.resource (hasPrefix "nvidia.com/mig-" $v.gpu.resource) | quote }}
gpus: {{ ternary (ternary 0 1 $v.demo) ($v.gpu.count | int) (kindIs "invalid" $v.gpu.count) }}
unauthenticated: {{ and (not $v.apiKeys.secret) (or $v.demo $v.allowUnauthenticated) }}
weights: {{ ternary "" (printf "/weights/%s" (ternary $v.weights.directory $hubDirectory (empty $v.weights.hubId)) | trimSuffix "/") $v.demo | quote }}
createWeightsClaim: {{ $createWeightsClaim }}
persistentData: {{ $persistentData }}
createDataClaim: {{ and $persistentData (not $v.data.existingClaim) }}
recreate: {{ or $persistentData (and $createWeightsClaim (hasPrefix "ReadWriteOnce" $v.weights.accessMode)) }}
maxGenerationSeconds: {{ $maxGenerationSeconds }}
terminationGraceSeconds: {{ add $v.drain.preStopSeconds $maxGenerationSeconds $v.drain.flushSeconds }}
{{- /* A request may arrive just before its connection ends, wait in the queue and then generate; 60 s is a margin. */}}
connectionAgeGraceSeconds: {{ add ($v.settings.queue_timeout_seconds | default 300 | ceil | int) $maxGenerationSeconds 60 }}
connectsOut: {{ or (not (empty (cat $v.weights.hubId $v.redis.secret $v.usage.secret ($v.settings.otlp_endpoint | default "") | trim))) false }}
testable: {{ and $v.test.enabled (or (not $v.apiKeys.secret) (not (empty $v.test.apiKey.secret))) (or (not $v.tls.clientCaSecret) (not (empty $v.test.clientSecret))) }}
{{- end -}}

{{/* Checks that a schema cannot express. */}}
{{- define "llama2.check" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- if $v.demo -}}
{{- if or $v.card.content $v.weights.hubId $v.weights.existingClaim -}}
{{- fail "demo: the demo model has its own card and weights; leave card.content and weights.* empty, or set demo to false" -}}
{{- end -}}
{{- else -}}
{{- if not (or $v.weights.hubId $v.weights.existingClaim) -}}
{{- fail "weights: not set; set weights.hubId to download them, or weights.existingClaim to a volume that has them, or demo to true" -}}
{{- end -}}
{{- if not (or $v.apiKeys.secret $v.allowUnauthenticated) -}}
{{- fail "apiKeys.secret: not set, so every client that can reach the port may call; set the Secret with the API keys file, or set allowUnauthenticated to true" -}}
{{- end -}}
{{- end -}}
{{- if and $v.apiKeys.secret $v.allowUnauthenticated -}}
{{- fail "allowUnauthenticated: apiKeys.secret is also set; set only one of them" -}}
{{- end -}}
{{- if and $v.weights.hubId $v.weights.directory -}}
{{- fail "weights.directory: the chart derives the directory from weights.hubId; leave it empty" -}}
{{- end -}}
{{- if and $v.tls.clientCaSecret (not $v.tls.secret) -}}
{{- fail "tls.clientCaSecret: mutual TLS also needs the server's certificate; set tls.secret" -}}
{{- end -}}
{{- if and $d.createWeightsClaim (gt (int $d.maxReplicas) 1) (hasPrefix "ReadWriteOnce" $v.weights.accessMode) -}}
{{- fail (printf "weights.accessMode: %d replicas cannot share a %s volume; set ReadWriteMany and a weights.storageClass that supports it, or set weights.existingClaim" (int $d.maxReplicas) $v.weights.accessMode) -}}
{{- end -}}
{{- range $kind, $amounts := pick $v.resources "requests" "limits" -}}
{{- range $name, $_ := $amounts -}}
{{- if or (eq $name $v.gpu.resource) (hasPrefix "nvidia.com/" $name) (hasPrefix "amd.com/" $name) -}}
{{- fail (printf "resources.%s: %s is set by gpu.count and gpu.resource, which also schedule the pod; remove it here" $kind $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names := list -}}
{{- range $v.extraEnv -}}
{{- if has .name $names -}}{{- fail (printf "extraEnv: %s is defined twice; remove one" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if and (not (kindIs "invalid" $v.podDisruptionBudget.minAvailable)) (not (kindIs "invalid" $v.podDisruptionBudget.maxUnavailable)) -}}
{{- fail "podDisruptionBudget: minAvailable and maxUnavailable exclude each other; set maxUnavailable to null, or leave minAvailable empty" -}}
{{- end -}}
{{- if and $v.podDisruptionBudget.enabled (kindIs "invalid" $v.podDisruptionBudget.minAvailable) (kindIs "invalid" $v.podDisruptionBudget.maxUnavailable) -}}
{{- fail "podDisruptionBudget: minAvailable and maxUnavailable are both empty; set one, or set enabled to false" -}}
{{- end -}}
{{- if and $v.usage.forwardClaims (not $v.usage.secret) -}}
{{- fail "usage.forwardClaims: the usage of the claims goes to PostgreSQL; set usage.secret" -}}
{{- end -}}
{{- if and $v.data.existingClaim (gt (int $d.maxReplicas) 1) -}}
{{- fail "data.existingClaim: several replicas cannot share one data volume; leave it empty and store usage in PostgreSQL (usage.secret)" -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (lt (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas)) -}}
{{- fail (printf "autoscaling.maxReplicas: %d is less than minReplicas (%d); raise it" (int $v.autoscaling.maxReplicas) (int $v.autoscaling.minReplicas)) -}}
{{- end -}}
{{- if and (or $v.autoscaling.enabled $v.alerts.enabled) (not $v.serviceMonitor.enabled) -}}
{{- fail "serviceMonitor.enabled: autoscaling and alerts need scraped metrics; set it to true" -}}
{{- end -}}
{{- if eq $d.workload "StatefulSet" -}}
{{- if not (and (kindIs "invalid" $v.rollingUpdate.maxSurge) (kindIs "invalid" $v.rollingUpdate.maxUnavailable)) -}}
{{- fail "rollingUpdate: a StatefulSet replaces its pods one by one; leave maxSurge and maxUnavailable empty, or set workload to Deployment" -}}
{{- end -}}
{{- $old := printf "%s-data" $d.name -}}
{{- if and (not $v.data.existingClaim) (lookup "v1" "PersistentVolumeClaim" .Release.Namespace $old) -}}
{{- fail (include "llama2.oldClaim" .) -}}
{{- end -}}
{{- end -}}
{{- $rolling := include "llama2.rollingUpdate" . | fromYaml -}}
{{- if and (eq (toString $rolling.maxSurge | trimSuffix "%") "0") (eq (toString $rolling.maxUnavailable | trimSuffix "%") "0") -}}
{{- fail "rollingUpdate: no pod can be replaced if maxSurge and maxUnavailable are both 0; raise one" -}}
{{- end -}}
{{- end -}}

{{/* A surge needs a spare GPU for its duration, so pods with a GPU are replaced one by one unless the values ask for a surge. */}}
{{- define "llama2.rollingUpdate" -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- $v := .Values.rollingUpdate -}}
{{- $gpu := gt (int $d.gpus) 0 -}}
maxSurge: {{ ternary (ternary 0 1 $gpu) $v.maxSurge (kindIs "invalid" $v.maxSurge) }}
maxUnavailable: {{ ternary (ternary 1 0 $gpu) $v.maxUnavailable (kindIs "invalid" $v.maxUnavailable) }}
{{- end -}}

{{/* The message if a Deployment of this release has left its data claim. */}}
{{- define "llama2.oldClaim" -}}
{{- $name := include "llama2.name" . -}}
{{- $namespace := .Release.Namespace -}}
{{- printf `data: the claim %s-data of a Deployment has the usage ledger, and a StatefulSet would not use it; do one of these:
  - keep it, with one replica: --set data.existingClaim=%s-data
  - store its records in PostgreSQL and delete it, before you upgrade again:
      helm upgrade … --set workload=Deployment --set replicas=0 --set 'usage.forwardClaims={%s-data}' --set usage.secret=…
      kubectl --namespace %s wait --for=condition=complete job --selector app.kubernetes.io/component=usage-forward
      kubectl --namespace %s delete pvc %s-data` $name $name $name $namespace $namespace $name -}}
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
requests: {cpu: "2", memory: 20Gi}
limits: {memory: 20Gi}
{{- end -}}
{{- end -}}

{{/* Selector of this release's time series, by the labels that the ServiceMonitor adds. */}}
{{- define "llama2.series" -}}
namespace="{{ .Release.Namespace }}",service="{{ include "llama2.name" . }}-headless"
{{- end -}}
