{{- define "portreeve.labels" -}}
app.kubernetes.io/name: portreeve
app.kubernetes.io/part-of: portreeve
{{- end }}

{{- define "portreeve.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
