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

{{/*
The card's limits: contextLength, the maximum number of tokens of a prompt and its reply together, and slots, the number of
requests that a replica serves at once.
*/}}
{{- define "llama2.limits" -}}
{{- $card := dict -}}
{{- range regexSplit "(?m)^---[ \\t]*$" (include "llama2.card" .) -1 -}}
{{- if and (not $card) (trim .) -}}{{- $card = fromYaml . -}}{{- end -}}
{{- end -}}
{{- if $card.Error -}}{{- fail (printf "card: not valid YAML: %s" $card.Error) -}}{{- end -}}
{{- $found := dict -}}
{{- $model := get $card "model" -}}
{{- if kindIs "map" $model -}}
{{- range ($model.properties | default list) -}}{{- $_ := set $found (toString .property_id) .value -}}{{- end -}}
{{- end -}}
{{- $contextLength := int $found.context_length_limit -}}
{{- if lt $contextLength 1 -}}{{- fail "card: model.properties has no positive context_length_limit; check that the file is a model card" -}}{{- end -}}
{{- $slots := int (fromYaml (toString $found.constellation_config)).max_concurrent_requests -}}
{{- if lt $slots 1 -}}{{- fail "card: constellation_config has no positive max_concurrent_requests; check that the file is a model card" -}}{{- end -}}
contextLength: {{ $contextLength }}
slots: {{ $slots }}
{{- end -}}
