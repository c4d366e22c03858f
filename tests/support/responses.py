#!/usr/bin/env python3
"""A stand-in for the Responses API, for tests: it listens on a free port of the loopback, prints
that port, and plays the model for whoever asks. What it answers is named in the prompt by
`play NAME`; how far the play is, it tells by the outputs of tools that came after that prompt.
Ends when its stdin does.

usage: responses.py
"""
import http.server
import json
import os
import re
import sys
import threading

# The scenes of each play: text, a shell command, or a status to fail with.
PLAYS = {
    "message": [("say", "Hello from the stand-in.")],
    "command": [("run", "echo it-works"), ("say", "It works.")],
    "exit3": [("run", "echo out; echo oops >&2; exit 3"), ("say", "It failed with 3.")],
    "file": [
        ("run", "apply_patch <<'EOF'\n*** Begin Patch\n*** Add File: made.txt\n+made by a test\n*** End Patch\nEOF"),
        ("say", "The file is there."),
    ],
    "fail": [("fail", 400)],
    "silence": [("hang", None)],
    "sleep": [("run", "setsid sleep 1000 & sleep 1000"), ("say", "Never said.")],
}


def scene_of(request):
    """The scene to play next."""
    play, done = None, 0
    for item in request.get("input", []):
        if item.get("type") in ("function_call_output", "custom_tool_call_output"):
            done += 1
        elif item.get("role") == "user":
            text = json.dumps(item.get("content"))
            named = re.findall(r"play (\w+)", text)
            if named:
                play, done = named[-1], 0
    return PLAYS[play][done]


def item_of(kind, value, number):
    if kind == "say":
        return {
            "type": "message",
            "role": "assistant",
            "id": "msg_%d" % number,
            "content": [{"type": "output_text", "text": value}],
        }
    return {
        "type": "function_call",
        "id": "fc_%d" % number,
        "call_id": "call_%d" % number,
        "name": "exec_command",
        "arguments": json.dumps({"cmd": value, "login": False, "yield_time_ms": 30000}),
    }


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count = 0

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(404, "application/json", b"{}")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, value = scene_of(json.loads(body))
        Handler.count += 1
        number = Handler.count
        if kind == "hang":
            threading.Event().wait()
        if kind == "fail":
            error = {"error": {"message": "the stand-in refuses", "type": "invalid_request_error"}}
            self.answer(value, "application/json", json.dumps(error).encode())
            return
        response = {"id": "resp_%d" % number}
        usage = {
            "input_tokens": 100,
            "input_tokens_details": {"cached_tokens": 40},
            "output_tokens": 7,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 107,
        }
        events = [
            {"type": "response.created", "response": response},
            {"type": "response.output_item.done", "item": item_of(kind, value, number)},
            {"type": "response.completed", "response": dict(response, usage=usage)},
        ]
        lines = ["event: %s\ndata: %s\n\n" % (event["type"], json.dumps(event)) for event in events]
        self.answer(200, "text/event-stream", "".join(lines).encode())

    def answer(self, status, kind, body):
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
