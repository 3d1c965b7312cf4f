{{- define "talksplat.name" -}}
{{- if contains "talksplat" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-talksplat" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* What a selector asks for: (list . "replica") or (list . "edge"). */ -}}
{{- define "talksplat.selector" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: talksplat
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "talksplat.labels" -}}
{{- $ := index . 0 -}}
{{ include "talksplat.selector" . }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version }}
{{- end }}

{{- define "talksplat.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{- define "talksplat.pod" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $.Values.image.user }}
  runAsGroup: {{ $.Values.image.user }}
  fsGroup: {{ $.Values.image.user }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{ include "talksplat.selector" (list $ $component) | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "talksplat.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "talksplat.rclone" -}}
image: {{ .image }}
env:
  - { name: RCLONE_CONFIG_STORE_TYPE, value: s3 }
  - { name: RCLONE_CONFIG_STORE_PROVIDER, value: Other }
  - { name: RCLONE_CONFIG_STORE_ENDPOINT, value: {{ .endpoint | quote }} }
  - { name: RCLONE_CONFIG_STORE_REGION, value: {{ .region | quote }} }
  - { name: RCLONE_CACHE_DIR, value: /tmp }
  - name: RCLONE_CONFIG_STORE_ACCESS_KEY_ID
    valueFrom: { secretKeyRef: { name: {{ .secret }}, key: accessKeyId } }
  - name: RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY
    valueFrom: { secretKeyRef: { name: {{ .secret }}, key: secretAccessKey } }
securityContext: {{ include "talksplat.container" . | nindent 2 }}
resources: {{ toYaml .resources | nindent 2 }}
volumeMounts:
  - { name: avatars, mountPath: /avatars }
  - { name: tmp, mountPath: /tmp }
{{- end }}
