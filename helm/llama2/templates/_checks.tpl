{{/* Checks that a schema cannot express. */}}
{{- define "llama2.check" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- if $v.demo -}}
{{- if or $v.card.content $v.weights.hubId $v.weights.existingClaim -}}
{{- fail "demo: the demo model has its own card and weights; leave card.content and weights.* empty, or set demo to false" -}}
{{- end -}}
{{- else -}}
{{- if not (or $v.weights.hubId $v.weights.existingClaim $v.weights.image.reference) -}}
{{- fail "weights: not set; set weights.hubId to download them, weights.existingClaim to a volume that has them, weights.image.reference to an image that has them, or demo to true" -}}
{{- end -}}
{{- if not (or $v.apiKeys.secret $v.allowUnauthenticated) -}}
{{- fail "apiKeys.secret: not set, so every client that can reach the port may call; set the Secret with the API keys file, or set allowUnauthenticated to true" -}}
{{- end -}}
{{- end -}}
{{- if and $v.apiKeys.secret $v.allowUnauthenticated -}}
{{- fail "allowUnauthenticated: apiKeys.secret is also set; set only one of them" -}}
{{- end -}}
{{- if and $v.weights.image.reference (or $v.weights.hubId $v.weights.existingClaim) -}}
{{- fail "weights.image.reference: weights.hubId or weights.existingClaim is also set; set only one place of the weights" -}}
{{- end -}}
{{- if and $v.weights.image.reference (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "weights.image.reference: image volumes need Kubernetes 1.31 or newer, and this cluster has %s; set weights.hubId or weights.existingClaim" .Capabilities.KubeVersion.Version) -}}
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
{{- if and $d.downloadJob $d.createWeightsClaim (hasPrefix "ReadWriteOnce" $v.weights.accessMode) -}}
{{- fail (printf "weights.download: the Job and the pods may run on different nodes, which cannot share a %s volume; set weights.accessMode to ReadWriteMany and a weights.storageClass that supports it, or set weights.download to pods" $v.weights.accessMode) -}}
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
{{- if and (or $v.autoscaling.enabled $v.alerts.enabled) (not (or $v.serviceMonitor.enabled $v.podMonitor.enabled)) -}}
{{- fail "serviceMonitor.enabled: autoscaling and alerts need scraped metrics; set it or podMonitor.enabled to true" -}}
{{- end -}}
{{- if and $v.serviceMonitor.enabled $v.podMonitor.enabled -}}
{{- fail "podMonitor.enabled: serviceMonitor.enabled is also true, so Prometheus would scrape every pod twice; set only one" -}}
{{- end -}}
{{- include "llama2.checkGateway" . -}}
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

{{- define "llama2.checkGateway" -}}
{{- $v := .Values -}}
{{- $gateway := $v.gateway -}}
{{- if and $v.envoy.enabled $v.tls.clientCaSecret (not $v.envoy.clientSecret) -}}
{{- fail "envoy.clientSecret: the servers require client certificates (tls.clientCaSecret); set the Secret with Envoy's certificate" -}}
{{- end -}}
{{- if and $gateway.http.enabled (not $v.envoy.enabled) -}}
{{- fail "gateway.http.enabled: Envoy converts JSON and gRPC-Web to gRPC; set envoy.enabled to true" -}}
{{- end -}}
{{- range $kind := list "grpc" "http" -}}
{{- if and (index $gateway $kind).enabled (not (index $gateway $kind).parentRefs) -}}
{{- fail (printf "gateway.%s.parentRefs: not set; name the Gateway of the route" $kind) -}}
{{- end -}}
{{- end -}}
{{- if and $gateway.grpc.enabled $gateway.http.enabled -}}
{{- range $parent := $gateway.grpc.parentRefs -}}
{{- if has $parent $gateway.http.parentRefs -}}
{{- if or (not $gateway.grpc.hostnames) (not $gateway.http.hostnames) -}}
{{- fail "gateway: one listener accepts either the GRPCRoute or the HTTPRoute for a host name; set different gateway.grpc.hostnames and gateway.http.hostnames, or parentRefs with different listeners (sectionName)" -}}
{{- end -}}
{{- range $name := $gateway.grpc.hostnames -}}
{{- range $other := $gateway.http.hostnames -}}
{{- if or (eq $name $other) (and (hasPrefix "*" $name) (hasSuffix (trimPrefix "*" $name) $other)) (and (hasPrefix "*" $other) (hasSuffix (trimPrefix "*" $other) $name)) -}}
{{- fail (printf "gateway.grpc.hostnames: %s overlaps with %s of gateway.http.hostnames, and a listener accepts only one of the routes then; set different names" $name $other) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
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
