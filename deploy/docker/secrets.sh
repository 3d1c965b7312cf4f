#!/bin/sh
# A first folder of secrets for docker-compose.yml: a certificate that this host signs itself, a tenant and its API key,
# Grafana's password. Leaves alone what is there.
#
#   secrets.sh FOLDER HOST      HOST: the name or address that clients know this machine by
set -eu
umask 077
mkdir -p "$1"
python - "$@" << 'END'
import secrets, sys
from pathlib import Path
from talksplat import edge

folder, host = Path(sys.argv[1]), sys.argv[2]
if not (folder / "certificate.pem").exists():
    edge.make_certificate(folder / "certificate.pem", folder / "certificate-key.pem", host)
    print(f"{folder}/certificate.pem: self-signed; clients take it as their CA.")
if not (folder / "tenants.toml").exists():
    print(f"{folder}/tenants.toml: its first API key, shown this once: {edge.make_tenants(folder / 'tenants.toml')}")
if not (folder / "grafana-password").exists():
    (folder / "grafana-password").write_text(secrets.token_urlsafe(18))
    print(f"{folder}/grafana-password: of the user admin.")
END
