#!/usr/bin/env bash
# webuiapi 0.9.17, the Python client of AUTOMATIC1111's API
#
# Expected: each call of txt2img sends what it was given. The README shows `sag=`, `adetailer=` and the like as
#   arguments of one call.
# Seen: a script given once is sent with every later call of the process that gives none, by any client object: the
#   second prompt below is made with self-attention guidance that nobody asked for, and the seed then gives another
#   image than a fresh process.
# Why: webuiapi/webuiapi.py, `def txt2img(..., alwayson_scripts={}, ...)`: the default dictionary is put into the
#   payload and the scripts are written into it.
# Output:
#   first call, no script: []
#   second call, sag given: ['Self Attention Guidance']
#   third call, new client, no script: ['Self Attention Guidance']
#   fourth call, alwayson_scripts={} given: []
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile webuiapi==0.9.17
"$work/venv/bin/python" -W ignore - <<'EOF'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import webuiapi

sent = []


class WebUI(BaseHTTPRequestHandler):
    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer([])

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        sent.append(list(payload["alwayson_scripts"]))
        self.answer({"images": [], "parameters": {}, "info": "{}"})

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), WebUI)
threading.Thread(target=server.serve_forever, daemon=True).start()


def client():
    return webuiapi.WebUIApi(port=server.server_port)


client().txt2img(prompt="a lighthouse")
print("first call, no script:", sent[-1])
client().txt2img(prompt="a lighthouse", sag=webuiapi.Sag(scale=0.75))
print("second call, sag given:", sent[-1])
client().txt2img(prompt="a harbour")
print("third call, new client, no script:", sent[-1])
client().txt2img(prompt="a harbour", alwayson_scripts={})
print("fourth call, alwayson_scripts={} given:", sent[-1])
server.shutdown()
sag = ["Self Attention Guidance"]
assert sent == [[], sag, sag, []], f"changed: {sent}"
EOF
