"""A server that speaks vLLM's protocol over a small transformers model of this process: samples, scores, takes weights.

It computes each position with the model's plain forward, in float32, and shares no code with the package's samplers.
"""

import threading
from pathlib import Path

import torch
from vllm_fake_server import FakeVLLM, log_softmax, shaped


class ModelServer(FakeVLLM):
    """Start with `with ModelServer(model, decode) as server:`. `first` are the weights it has after a restart."""

    def __init__(self, model, decode, **options):
        super().__init__(**{"max_model_len": 512, **options})
        self.model, self.decode = model.float().eval(), decode
        self.first = {k: v.clone() for k, v in model.state_dict().items()}
        self.loads = 0
        self.turn = threading.Lock()

    def restart(self):
        with self.turn:
            self.model.load_state_dict(self.first)
        self.version = "default"

    def load(self, folder):
        from safetensors.torch import load_file

        given = load_file(Path(folder) / "model.safetensors")
        wanted = {n for n, _ in self.model.named_parameters()}
        with self.turn:
            self.model.load_state_dict(given, strict=False)
        self.loads += 1
        return {"missing": sorted(wanted - given.keys()), "repacked": []}

    def logits(self, ids):
        with self.turn, torch.no_grad():
            return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def answer(self, body):
        stream = torch.Generator().manual_seed(body.get("seed", 0) % (1 << 31))
        ids, logprobs, reason, stopped_by = [], [], "length", None
        while len(ids) < body["max_tokens"]:
            row = self.logits([*body["prompt"], *ids])[-1]
            if body["temperature"] == 0:
                lp, token = row.log_softmax(-1), int(row.argmax())
            else:
                lp = torch.tensor(shaped(row.tolist(), body["temperature"], body["top_p"]))
                token = int(torch.multinomial(lp.exp(), 1, generator=stream))
            ids.append(token)
            logprobs.append(float(lp[token]))
            if token in body.get("stop_token_ids", ()):
                reason, stopped_by = "stop", token
                break
        choice = {
            "index": 0,
            "text": self.decode(ids),
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "finish_reason": reason,
            "stop_reason": stopped_by,
            "logprobs": {"token_logprobs": logprobs, "tokens": [str(i) for i in ids]},
            "prompt_logprobs": None,
        }
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self.scores(body["prompt"], body["prompt_logprobs"])
        return {"choices": [choice], "model": "fake"}

    def scores(self, prompt, k):
        rows = [None]
        for row, token in zip(self.logits(prompt)[:-1].tolist(), prompt[1:], strict=True):
            logprobs = log_softmax(row)
            order = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])
            found = {str(token): {"logprob": logprobs[token], "rank": order.index(token) + 1}}
            found |= {str(i): {"logprob": logprobs[i], "rank": r + 1} for r, i in enumerate(order[:k])}
            rows.append(found)
        return rows
