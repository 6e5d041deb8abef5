"""A server that speaks vLLM's protocol over a table of next-token logits, and fails on request.

The table is the whole model: row `t` has the logits after token `t`. It shares no code with the package.
"""

import itertools
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TABLE = [
    [0.0, 1.0, -1.0, 0.5, 0.2],
    [2.0, 0.0, 0.1, -0.5, -1.0],
    [0.3, 0.3, 0.0, 1.5, -0.2],
    [-1.0, 0.7, 0.9, 0.0, 0.4],
    [0.1, 0.2, 0.3, 0.4, 0.5],
]
WORDS = ["a", "b", "c", "d", "<end>"]
END = 4


def log_softmax(logits):
    top = max(logits)
    z = top + math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - z for x in logits]


def shaped(logits, temperature, top_p):
    """Log-probabilities of what is sampled: temperature, then the smallest most likely set that reaches top_p."""
    if temperature == 0:
        return log_softmax(logits)
    logprobs = log_softmax([x / temperature for x in logits])
    order = sorted(range(len(logits)), key=lambda i: -logprobs[i])
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += math.exp(logprobs[i])
    z = math.log(mass) if len(kept) < len(order) else 0.0
    return [logprobs[i] - z if i in kept else -9999.0 for i in range(len(logits))]


class FakeVLLM:
    """Start with `with FakeVLLM() as fake:`; `fake.url` is its address.

    `faults` holds what happens to the next completion requests, first first: an int is answered with that status, a
    tuple (status, headers) likewise, "drop" closes the connection, "cut" closes it inside the body, "garbage" is no
    JSON, "wrong_ids" echoes another prompt, "no_ids" none, "abort" is aborted; None is answered.
    """

    def __init__(self, *, mode="processed_logprobs", max_model_len=64, has_dev_routes=True, has_extension=True):
        self.mode, self.max_model_len = mode, max_model_len
        self.has_dev_routes, self.has_extension = has_dev_routes, has_extension
        self.table, self.version = [list(row) for row in TABLE], "default"
        self.faults, self.bodies, self.paths, self.headers = [], [], [], []
        self.always = None
        self.before = lambda body: None
        self.lock = threading.Lock()
        self.now = self.most = 0

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args):
                pass

            def do_GET(self):
                fake.handle(self, None)

            def do_POST(self):
                size = int(self.headers.get("Content-Length", 0))
                fake.handle(self, json.loads(self.rfile.read(size) or b"null"))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def restart(self):
        """What a supervisor does after a crash: the same address, the first weights."""
        with self.lock:
            self.table, self.version = [list(row) for row in TABLE], "default"

    def handle(self, request, body):
        path = request.path
        with self.lock:
            self.paths.append(path)
            self.headers.append(dict(request.headers.items()))
        if path in ("/v1/completions", "/v1/chat/completions"):
            with self.lock:
                self.bodies.append(body)
                self.now += 1
                self.most = max(self.most, self.now)
                fault = self.faults.pop(0) if self.faults else self.always
            try:
                self.before(body)
                self.complete(request, body, fault)
            finally:
                with self.lock:
                    self.now -= 1
            return
        self.other(request, path, body)

    def other(self, request, path, body):
        if path == "/health":
            return send(request, 200, None)
        if path == "/version":
            return send(request, 200, {"version": "0.0.fake"})
        if path == "/v1/models":
            return send(request, 200, {"data": [{"id": "fake", "max_model_len": self.max_model_len}]})
        if not self.has_dev_routes:
            return send(request, 404, {"detail": "Not Found"})
        if path == "/weight_info":
            return send(request, 200, {"weight_version": self.version})
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == "/collective_rpc":
            if not self.has_extension:
                said = "Worker failed with error ''CPUWorker' object has no attribute 'tutelage_load''"
                return send(request, 500, {"error": {"message": said, "code": 500}})
            return send(request, 200, {"results": [self.load(body["args"][0])]})
        return send(request, 200, {"status": "ok"})

    def load(self, folder):
        from safetensors.torch import load_file

        tensors = load_file(Path(folder) / "model.safetensors")
        if "table" not in tensors:
            return {"missing": ["table"], "repacked": []}
        self.table = tensors["table"].tolist()
        return {"missing": [], "repacked": []}

    def complete(self, request, body, fault):
        if isinstance(fault, tuple):
            return send(request, fault[0], {"error": {"message": f"fault {fault[0]}"}}, fault[1])
        if isinstance(fault, int):
            return send(request, fault, {"error": {"message": f"fault {fault}"}})
        if fault == "drop":
            request.close_connection = True
            return request.connection.close()
        if fault == "garbage":
            return send(request, 200, None, raw=b"<html>busy</html>")
        answer = self.chat(body) if "messages" in body else self.answer(body)
        if fault == "wrong_ids":
            answer["choices"][0]["prompt_token_ids"] = [*body["prompt"][:-1], 0]
        if fault == "no_ids":
            del answer["choices"][0]["prompt_token_ids"]
        if fault == "abort":
            answer["choices"][0]["finish_reason"] = "abort"
        send(request, 200, answer, is_cut=fault == "cut")

    def chat(self, body):
        last = body["messages"][-1]["content"]
        text = f"{last} #{body.get('seed', 0) % 1000}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(last), "completion_tokens": len(text), "total_tokens": len(last) + len(text)}
        return {"choices": [choice], "usage": usage, "model": body["model"]}

    def answer(self, body):
        stream = random.Random(body.get("seed", 0))
        ids, logprobs, text = [], [], ""
        reason, stopped_by, token = "length", None, body["prompt"][-1]
        while len(ids) < body["max_tokens"]:
            logits = self.table[token]
            q = shaped(logits, body["temperature"], body["top_p"])
            if body["temperature"] == 0:
                token = max(range(len(q)), key=q.__getitem__)
            else:
                token = stream.choices(range(len(q)), [math.exp(x) for x in q])[0]
            ids.append(token)
            logprobs.append((q if self.mode == "processed_logprobs" else log_softmax(logits))[token])
            if token in body.get("stop_token_ids", ()):
                reason, stopped_by = "stop", token
                break
            text += WORDS[token]
            hit = next((s for s in body.get("stop", ()) if s in text), None)
            if hit:
                reason, stopped_by, text = "stop", hit, text[: text.index(hit)]
                break
        choice = {
            "index": 0,
            "text": text,
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "finish_reason": reason,
            "stop_reason": stopped_by,
            "logprobs": None,
            "prompt_logprobs": None,
        }
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": logprobs, "tokens": [WORDS[i] for i in ids]}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self.scores(body["prompt"], body["prompt_logprobs"])
        return {"choices": [choice], "model": "fake"}

    def scores(self, prompt, k):
        rows = [None]
        for before, token in itertools.pairwise(prompt):
            logprobs = log_softmax(self.table[before])
            order = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])
            row = {str(token): {"logprob": logprobs[token], "rank": order.index(token) + 1}}
            row |= {str(i): {"logprob": logprobs[i], "rank": r + 1} for r, i in enumerate(order[:k])}
            rows.append(row)
        return rows


def send(request, status, value, headers=(), *, raw=None, is_cut=False):
    data = raw if raw is not None else b"" if value is None else json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    for name, text in dict(headers).items():
        request.send_header(name, text)
    request.end_headers()
    request.wfile.write(data[: len(data) // 2] if is_cut else data)
    if is_cut:
        request.close_connection = True
