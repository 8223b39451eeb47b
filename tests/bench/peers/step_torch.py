#!/usr/bin/env python3
"""Training steps of PyTorch on the CPU, of the model in a configuration of `longspan bench step`: the same
Llama (RMSNorm, RoPE, SwiGLU), scaled_dot_product_attention, bf16 autocast for precision BF16, clipping,
fused AdamW, one row of random tokens a step.

Prints one JSON object a configuration with the keys of `longspan bench step --json`. Configurations with
other masks than causal are refused. Without PyTorch 2.5 or newer it says so and exits 0.

usage: step_torch.py [--problem FILE]... [--set FIELD=VALUE]... [--threads N] [--seconds S] [--repeats N]
                     [--serve]

--serve reads one file name a line from standard input and answers with its record and a line
{"done": name}; model and optimizer of the last file are kept.
"""

import argparse
import math
import os
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import Refused, answer, first_line, quantiles, record, say  # noqa: E402

LOSS_CHUNK = 2048  # tokens of logits in f32 at a time


class Settings:
    """The fields of a configuration that decide what a step computes."""

    def __init__(self, path, sets):
        with open(path, encoding="utf-8") as file:
            self.text = re.sub(r"#[^\n]*", "", file.read())
        self.sets = dict(setting.split("=", 1) for setting in sets)
        self.name = os.path.splitext(os.path.basename(path))[0]
        known = {"model.layers", "run.precision", "run.recompute", "run.context_length",
                 "run.global_batch_tokens", "model.vocab_size", "model.hidden_size", "model.num_layers",
                 "model.num_heads", "model.num_kv_heads", "model.head_dim", "model.ffn_hidden_size",
                 "model.tie_embeddings"}
        if unknown := set(self.sets) - known:
            raise Refused(f"--set {sorted(unknown)[0]} is not known to this peer")
        self.tokens = self.number("run.context_length")
        self.vocab, self.width = self.number("model.vocab_size"), self.number("model.hidden_size")
        self.layers, self.ffn = self.number("model.num_layers"), self.number("model.ffn_hidden_size")
        self.heads, self.kv_heads = self.number("model.num_heads"), self.number("model.num_kv_heads")
        self.head_dim = self.number("model.head_dim", self.width // self.heads)
        self.tied = self.value("model.tie_embeddings", "false") == "true"
        self.bf16 = self.value("run.precision", "BF16") == "BF16"
        self.theta = float(self.value("model.theta", "10000"))
        causal = re.findall(r'name:\s*"([\w-]+)"\s*softmax\s*\{\s*causal\s*\{', self.text)
        layers = re.search(r'layers:\s*"([^"]*)"', self.text).group(1)
        if set(self.sets.get("model.layers", layers).split()) - set(causal):
            raise Refused("PyTorch has no such masks on CPUs in a training step")
        if self.value("run.recompute", "NONE") != "NONE":
            raise Refused("recomputation is not written for this peer")

    def value(self, field, default):
        found = re.search(rf"\b{field.split('.')[-1]}:\s*([\w.+-]+)", self.text)
        return self.sets.get(field, found.group(1) if found else default)

    def number(self, field, default=None):
        return int(self.value(field, default))


def build(torch, s):
    """The model, as a function of the ids to the sum of losses, and its parameters."""
    nn, functional = torch.nn, torch.nn.functional

    class Norm(nn.RMSNorm):
        def forward(self, x):  # PyTorch has a fused form for operands of one dtype
            return functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(Norm(s.width, eps=1e-5) for _ in range(2))

            def linear(inputs, outputs):
                return nn.Linear(inputs, outputs, bias=False)
            self.q = linear(s.width, s.heads * s.head_dim)
            self.k = linear(s.width, s.kv_heads * s.head_dim)
            self.v = linear(s.width, s.kv_heads * s.head_dim)
            self.o = linear(s.heads * s.head_dim, s.width)
            self.gate, self.up = linear(s.width, s.ffn), linear(s.width, s.ffn)
            self.down = linear(s.ffn, s.width)

        def attention(self, x, cos, sin):
            def heads(y):
                return y.view(1, s.tokens, -1, s.head_dim).transpose(1, 2)

            def rotate(y):
                first, second = y.chunk(2, dim=-1)
                return y * cos + torch.cat((-second, first), dim=-1) * sin
            q, k, v = rotate(heads(self.q(x))), rotate(heads(self.k(x))), heads(self.v(x))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                          enable_gqa=s.heads != s.kv_heads)
            return self.o(out.transpose(1, 2).reshape(1, s.tokens, -1))

        def forward(self, x, cos, sin):
            x = x + self.attention(self.norms[0](x), cos, sin)
            y = self.norms[1](x)
            return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(s.vocab, s.width)
            self.layers = nn.ModuleList(Layer() for _ in range(s.layers))
            self.norm = Norm(s.width, eps=1e-5)
            self.head = nn.Linear(s.width, s.vocab, bias=False)
            if s.tied:
                self.head.weight = self.table.weight
            for weights in self.parameters():
                if weights.dim() == 2:
                    nn.init.normal_(weights, std=0.02)
            angles = torch.arange(s.tokens)[:, None].double() * s.theta ** (
                -torch.arange(0, s.head_dim, 2).double() / s.head_dim)
            dtype = torch.bfloat16 if s.bf16 else torch.float32
            self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)
            self.sin = torch.cat((angles.sin(), angles.sin()), dim=-1).to(dtype)

        def forward(self, ids, labels):
            x = self.table(ids)
            if s.bf16:
                x = x.bfloat16()  # the residual stream, as in the other program
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            x, loss = self.norm(x)[0], 0
            for begin in range(0, s.tokens, LOSS_CHUNK):
                logits = self.head(x[begin:begin + LOSS_CHUNK])
                loss = loss + functional.cross_entropy(logits.float(), labels[begin:begin + LOSS_CHUNK],
                                                       reduction="sum")
            return loss / s.tokens

    return Model()


class Training:
    def __init__(self, torch, settings):
        torch.manual_seed(1)
        self.torch, self.settings = torch, settings
        self.model = build(torch, settings)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, betas=(0.9, 0.95),
                                           weight_decay=0.1, fused=True)
        self.first_loss = self.step()  # the warm-up too

    def step(self):
        torch, s = self.torch, self.settings
        ids = torch.randint(s.vocab, (1, s.tokens + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=s.bf16):
            loss = self.model(ids[:, :-1], ids[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def measure(self, seconds, repeats):
        times, start = [], time.perf_counter()
        while len(times) < repeats or time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            if not math.isfinite(self.step()):
                raise Refused("the loss is not finite")
            times.append((time.perf_counter() - begin) * 1e3)
        return quantiles(times)


class Server:
    def __init__(self, torch, arguments):
        self.torch, self.arguments = torch, arguments
        self.path, self.training = None, None

    def run(self, path):
        settings = None
        try:
            settings = Settings(path, self.arguments.set)
            if path != self.path:
                self.training = None  # its memory goes first
                self.training = Training(self.torch, settings)
                self.path = path
            median, p90 = self.training.measure(self.arguments.seconds, self.arguments.repeats)
        except Exception as error:  # whatever is raised is the answer
            say(record("step", path, "torch", None, "cpu", refused=first_line(error)))
            return
        say(record("step", f"{settings.name}_T{settings.tokens}",
                   "torch_bf16_autocast" if settings.bf16 else "torch_f32", "both", "cpu",
                   threads=self.torch.get_num_threads(), ms_median=median, ms_p90=p90,
                   tokens_per_s=settings.tokens / median * 1e3, parameters=self.training.parameters,
                   first_loss=self.training.first_loss, vocab_size=settings.vocab))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("peer not run: PyTorch is not installed")
        return 0
    if not hasattr(torch.nn, "RMSNorm"):
        print(f"peer not run: PyTorch {torch.__version__} is older than 2.5")
        return 0
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    server = Server(torch, arguments)
    if arguments.serve:
        answer(sys.stdin, torch.__version__, server.run)
    else:
        for path in arguments.problem or [os.path.join(here, "..", "problems", "llama_50m.textproto")]:
            server.run(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
