{{- define "portreeve.labels" -}}
app.kubernetes.io/name: portreeve
app.kubernetes.io/part-of: portreeve
{{- end }}

{{- define "portreeve.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* All settings, those that other values bring included. */}}
{{- define "portreeve.settings" -}}
{{- $settings := deepCopy .Values.settings }}
{{- with .Values.bridges }}
{{- $_ := set $settings "PORTREEVE_BRIDGE" (join "," .) }}
{{- end }}
{{- if .Values.jaeger.enabled }}
{{- $_ := set $settings "PORTREEVE_OTLP_ENDPOINT" (printf "http://jaeger.%s.svc:4317" .Release.Namespace) }}
{{- end }}
{{- if .Values.startupTaint.enabled }}
{{- $_ := set $settings "PORTREEVE_STARTUP_TAINT" "portreeve.io/agent-not-ready" }}
{{- end }}
{{- range $name, $value := $settings }}
{{ $name }}: {{ $value | quote }}
{{- end }}
{{- end }}
