{{/* Envoy's names, and its configuration: the example's, with the addresses, certificates and times of this release. */}}
{{- define "llama2.envoySelector" -}}
app.kubernetes.io/name: {{ include "llama2.appName" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: envoy
{{- end -}}

{{- define "llama2.envoyImage" -}}
{{- with .Values.envoy.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* A reference to a certificate in a file of the ConfigMap. Envoy reads the mounted files again when they change. Argument: its name. */}}
{{- define "llama2.envoySecret" -}}
name: {{ . }}
sds_config:
  path_config_source: {path: ./sds-{{ . }}.yaml}
{{- end -}}

{{- define "llama2.envoyConfig" -}}
{{- $v := .Values -}}
{{- $d := include "llama2.derived" . | fromYaml -}}
{{- $config := .Files.Get "files/envoy/envoy.yaml" | fromYaml -}}
{{- $_ := set $config "admin" (dict "address" (dict "socket_address" (dict "address" "127.0.0.1" "port_value" 9901))) -}}
{{- $_ = set $config "node" (dict "id" $d.name "cluster" $d.name) -}}

{{- $listener := first $config.static_resources.listeners -}}
{{- $_ = set $listener "address" (dict "socket_address" (dict "address" "0.0.0.0" "port_value" 8080)) -}}
{{- $chain := first $listener.filter_chains -}}
{{- if $v.envoy.tls.secret -}}
{{- $_ = set $chain "transport_socket" (include "llama2.envoyDownstreamTls" . | fromYaml) -}}
{{- end -}}
{{- $manager := (first $chain.filters).typed_config -}}
{{- $_ = set $manager "stream_idle_timeout" (printf "%ds" (int $d.connectionAgeGraceSeconds)) -}}
{{- /* Clients then find new Envoys. A connection with running requests is not closed. */}}
{{- $_ = set $manager "common_http_protocol_options" (dict "max_connection_duration" "1800s") -}}
{{- $host := first $manager.route_config.virtual_hosts -}}
{{- $origins := list -}}
{{- range $v.envoy.allowOrigins -}}{{- $origins = append $origins (dict "exact" .) -}}{{- end -}}
{{- $_ = set (index $host.typed_per_filter_config "envoy.filters.http.cors") "allow_origin_string_match" $origins -}}
{{- $_ = set $config.static_resources "listeners" (list $listener (include "llama2.envoyHealthListener" . | fromYaml)) -}}

{{- $cluster := first $config.static_resources.clusters -}}
{{- $address := dict "address" (printf "%s-headless.%s.svc" $d.name .Release.Namespace) "port_value" 50051 -}}
{{- $_ = set (first (first $cluster.load_assignment.endpoints).lb_endpoints).endpoint "address" (dict "socket_address" $address) -}}
{{- if $v.tls.secret -}}
{{- $_ = set $cluster "transport_socket" (include "llama2.envoyUpstreamTls" . | fromYaml) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The port of the readiness probe. It fails from the start of the drain. */}}
{{- define "llama2.envoyHealthListener" -}}
name: health
address: {socket_address: {address: 0.0.0.0, port_value: 8081}}
filter_chains:
  - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: health
          route_config: {name: health}
          http_filters:
            - name: envoy.filters.http.health_check
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
                pass_through_mode: false
                headers: [{name: ":path", string_match: {exact: /ready}}]
            - name: envoy.filters.http.router
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
{{- end -}}

{{- define "llama2.envoyDownstreamTls" -}}
name: envoy.transport_sockets.tls
typed_config:
  "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
  common_tls_context:
    alpn_protocols: [h2, http/1.1]
    tls_certificate_sds_secret_configs:
      - {{- include "llama2.envoySecret" "envoy" | nindent 8 }}
{{- end -}}

{{- define "llama2.envoyUpstreamTls" -}}
{{- $host := printf "%s.%s.svc" (include "llama2.name" .) .Release.Namespace -}}
name: envoy.transport_sockets.tls
typed_config:
  "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
  sni: {{ $host | quote }}
  common_tls_context:
    alpn_protocols: [h2]
    combined_validation_context:
      default_validation_context:
        match_typed_subject_alt_names:
          - {san_type: DNS, matcher: {exact: {{ $host | quote }}}}
      validation_context_sds_secret_config: {{- include "llama2.envoySecret" "authority" | nindent 8 }}
    {{- if .Values.tls.clientCaSecret }}
    tls_certificate_sds_secret_configs:
      - {{- include "llama2.envoySecret" "client" | nindent 8 }}
    {{- end }}
{{- end -}}

{{/* A file with a certificate and its key. Argument: (list name directory). */}}
{{- define "llama2.envoyCertificate" -}}
resources:
  - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
    name: {{ index . 0 }}
    tls_certificate:
      certificate_chain: {filename: {{ index . 1 }}/tls.crt}
      private_key: {filename: {{ index . 1 }}/tls.key}
      watched_directory: {path: {{ index . 1 }}}
{{- end -}}

{{- define "llama2.envoyAuthority" -}}
resources:
  - "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
    name: authority
    validation_context:
      trusted_ca: {filename: /etc/llama2/ca/ca.crt}
      watched_directory: {path: /etc/llama2/ca}
{{- end -}}

{{/*
Drains Envoy before SIGTERM, which ends it at once. Its clients move to other Envoys with their next requests, and the
running requests end. The image has bash, but no HTTP client.
*/}}
{{- define "llama2.envoyDrain" -}}
admin() {
  exec 3<>/dev/tcp/127.0.0.1/9901
  printf '%s %s HTTP/1.1\r\nHost: envoy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
}
admin POST /healthcheck/fail
sleep {{ .Values.drain.preStopSeconds }}
until admin GET '/stats?filter=http.http.downstream_rq_active' | grep --quiet 'downstream_rq_active: 0$'; do sleep 1; done
{{- end -}}
