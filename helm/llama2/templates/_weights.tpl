{{/* The containers that download the weights, and that wait for a Job which does. */}}
{{- define "llama2.fetchContainer" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
name: weights
image: {{ include "llama2.image" . | quote }}
imagePullPolicy: {{ $v.image.pullPolicy | quote }}
command: [llama2-server, weights, fetch]
args:
  - {{ $v.weights.hubId | quote }}
  - {{ printf "--to=%s" $d.weights | quote }}
  {{- with $v.weights.revision }}
  - {{ printf "--revision=%s" . | quote }}
  {{- end }}
{{- /* Without the second variable the library would keep a second copy of up to 10 GB of the download. */}}
{{- $env := list (dict "name" "HF_HOME" "value" "/tmp/huggingface") (dict "name" "HF_XET_CHUNK_CACHE_SIZE_BYTES" "value" "0") }}
{{- with $v.weights.hubToken.secret }}
{{- $reference := dict "name" . "key" $v.weights.hubToken.key }}
{{- $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" $reference)) }}
{{- end }}
env: {{- include "llama2.withExtraEnv" (list . $env) | trim | nindent 2 }}
{{- with $v.extraEnvFrom }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $d.downloadJob }}
resources:
  requests: {cpu: "1", memory: 2Gi}
  limits: {memory: 4Gi}
{{- else }}
resources: {{- include "llama2.resources" . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml $v.containerSecurityContext | nindent 2 }}
volumeMounts:
  - {name: weights, mountPath: /weights}
  - {name: tmp, mountPath: /tmp}
  {{- with $v.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "llama2.waitContainer" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
name: weights
image: {{ include "llama2.image" . | quote }}
imagePullPolicy: {{ $v.image.pullPolicy | quote }}
command: [llama2-server, weights, wait]
args:
  - {{ $v.weights.hubId | quote }}
  - {{ printf "--in=%s" $d.weights | quote }}
  {{- with $v.weights.revision }}
  - {{ printf "--revision=%s" . | quote }}
  {{- end }}
resources:
  requests: {cpu: 100m, memory: 128Mi}
  limits: {memory: 256Mi}
securityContext: {{- toYaml $v.containerSecurityContext | nindent 2 }}
volumeMounts:
  - {name: weights, mountPath: /weights, readOnly: true}
{{- end -}}

{{/* The spec of the Job's pod. */}}
{{- define "llama2.downloadPod" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
restartPolicy: Never
serviceAccountName: {{ include "llama2.serviceAccount" . | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $v.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
securityContext: {{- toYaml $v.podSecurityContext | nindent 2 }}
containers:
  - {{- include "llama2.fetchContainer" . | nindent 4 }}
volumes:
  {{- with $v.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  - name: weights
    persistentVolumeClaim: {claimName: {{ $v.weights.existingClaim | default (printf "%s-weights" $d.name) | quote }}}
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
{{- with $v.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $v.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
