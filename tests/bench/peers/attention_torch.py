#!/usr/bin/env python3
"""PyTorch's scaled_dot_product_attention on the CPU, on the cases of `longspan bench attention`.

Prints one JSON object a line with the keys of `longspan bench --json`. Peaks and floors are those
of the other program, so they are null here. Without PyTorch 2.0 or newer it says so and exits 0.

usage: attention_torch.py [--problem NAME_OR_FILE]... [--filter S] [--pass forward|backward|both]
                          [--threads N] [--seconds S] [--list]

--list prints the facts about each case (pairs, fractions, FLOPs) without running anything.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time

BLOCK = 64  # tokens of the blocks of block_fraction
KEYS = ("op case pass impl device threads ms_median ms_p90 flops bytes visible_fraction "
        "block_fraction peak_gflops peak_gbps floor_ms fraction_of_floor peer peer_ms_median").split()


class Case:
    """One row of T tokens, as its name says."""

    def __init__(self, name):
        words = name.split("_")
        self.name, self.kind, self.dtype = name, words[0], words[1]
        self.size = {k: int(v) for k, v in
                     (re.fullmatch(r"([A-Za-z]+)(\d+)", word).groups() for word in words[2:])}
        self.tokens, self.heads = self.size["T"], self.size["Hq"]
        self.kv_heads, self.head_dim = self.size["Hkv"], self.size["D"]
        self.document = self.size.get("P", self.tokens)
        sparse = self.kind == "s2" and self.size["V"] > 1
        self.distinct = range(self.kv_heads) if sparse else range(1)

    def visible(self, head, q, k):
        """Whether query q sees key k; works on integers and on tensors of them."""
        begin = q - q % self.document
        inside = (k >= begin) & (k < begin + self.document)
        if self.kind == "full":
            return inside
        past = inside & (k <= q)
        if self.kind == "causal":
            return past
        if self.kind == "window":
            near = q - k < self.size["W"]
            return past & (near | (k - begin < self.size.get("S", 0)))
        if head >= self.kv_heads - self.size.get("N", 0):
            return past
        block, stride = self.size["B"], self.size["V"]
        step = max(1, stride // self.kv_heads)
        local = q // block - k // block < self.size["L"]
        return past & (local | ((k // block - begin // block + head * step) % stride == 0))

    def facts(self, pairs, blocks):
        """Visible pairs and the two fractions of what attention would have, per kv head, from sums
        over the distinct heads."""
        n, b, heads = self.tokens, -(-self.tokens // BLOCK), len(self.distinct)
        both_ways = self.kind == "full"
        whole = n * n if both_ways else n * (n + 1) // 2
        whole_blocks = b * b if both_ways else b * (b + 1) // 2
        return pairs / heads, pairs / heads / whole, blocks / heads / whole_blocks

    def count(self):
        """facts(), pair by pair."""
        pairs, seen = 0, set()
        for head in self.distinct:
            for q in range(self.tokens):
                keys = [k for k in range(self.tokens) if self.visible(head, q, k)]
                pairs += len(keys)
                seen.update((head, q // BLOCK, k // BLOCK) for k in keys)
        return self.facts(pairs, len(seen))


def count_masks(case, masks):
    """facts() from masks, for rows on which Python loops take too long."""
    rows = -(-case.tokens // BLOCK)
    blocks = 0
    for mask in masks:
        for row in range(rows):
            seen = mask[row * BLOCK:(row + 1) * BLOCK].any(dim=0)
            blocks += sum(bool(seen[c * BLOCK:(c + 1) * BLOCK].any()) for c in range(rows))
    return case.facts(sum(int(mask.sum()) for mask in masks), blocks)


def record(case, backward, facts):
    pairs, visible, blocks = facts
    flops = 4 * pairs * case.heads * case.head_dim * (2.5 if backward else 1)
    size = {"f32": 4, "bf16": 2, "f64": 8}[case.dtype]
    q = case.tokens * case.heads * case.head_dim
    kv = 2 * case.tokens * case.kv_heads * case.head_dim
    line = dict.fromkeys(KEYS)
    line.update(op="attention", case=case.name, device="cpu", impl="torch_sdpa", flops=flops,
                visible_fraction=visible, block_fraction=blocks,
                bytes=((4 * q + 2 * kv) if backward else (2 * q + kv)) * size)
    line["pass"] = "backward" if backward else "forward"
    return line


def measure(run, seconds):
    """Median and 90th percentile in ms of at least 5 runs after one warm-up."""
    run()
    times, start = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    times.sort()
    return statistics.median(times), times[-(-9 * len(times) // 10) - 1]


class TorchRun:
    """Operands of one case as [1, heads, T, D], one call per group of heads with equal masks. K and
    V are repeated for the query heads of a group beforehand; that is not timed."""

    def __init__(self, torch, case):
        self.torch, self.case = torch, case
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[case.dtype]
        generator = torch.Generator().manual_seed(1)

        def random(heads):
            shape = (1, heads, case.tokens, case.head_dim)
            return torch.randn(shape, generator=generator).to(dtype)

        group = case.heads // case.kv_heads
        at = torch.arange(case.tokens)
        self.masks = [case.visible(h, at[:, None], at[None, :]) for h in case.distinct]
        plain = case.document == case.tokens and case.kind in ("full", "causal")
        self.causal = plain and case.kind == "causal"
        heads = case.kv_heads // len(self.masks)  # of one call
        self.calls = []
        for mask in self.masks:
            k, v = random(heads), random(heads)
            operands = [random(heads * group), k.repeat_interleave(group, dim=1),
                        v.repeat_interleave(group, dim=1)]
            gradient = random(heads * group)
            self.calls.append(([x.requires_grad_() for x in operands], gradient,
                               None if plain else mask))

    def forward(self):
        attention = self.torch.nn.functional.scaled_dot_product_attention
        return [attention(*operands, attn_mask=mask, is_causal=self.causal)
                for operands, _, mask in self.calls]

    def backward(self, outputs):
        for output, (operands, gradient, _) in zip(outputs, self.calls):
            self.torch.autograd.grad(output, operands, gradient, retain_graph=True)


def run_case(torch, case, arguments):
    run = TorchRun(torch, case)
    facts = count_masks(case, run.masks)

    def report(backward, timing):
        line = record(case, backward, facts)
        line["threads"] = torch.get_num_threads()
        line["ms_median"], line["ms_p90"] = timing
        print(json.dumps(line), flush=True)

    if arguments.passes != "backward":
        with torch.no_grad():
            report(False, measure(run.forward, arguments.seconds))
    if arguments.passes != "forward":
        outputs = run.forward()
        report(True, measure(lambda: run.backward(outputs), arguments.seconds))


def read_cases(arguments):
    here = os.path.dirname(os.path.abspath(__file__))
    problems = arguments.problem or [os.path.join(here, "..", "problems", "attention_default.txt")]
    names = []
    for problem in problems:
        if os.path.isfile(problem):
            with open(problem, encoding="utf-8") as lines:
                stripped = (line.split("#")[0].strip() for line in lines)
                names += [name for name in stripped if name]
        else:
            names.append(problem)
    return [Case(name) for name in names if arguments.filter in name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--filter", default="")
    parser.add_argument("--pass", dest="passes", default="both",
                        choices=["forward", "backward", "both"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    cases = read_cases(arguments)
    if arguments.list:
        for case in cases:
            facts = case.count()
            for backward in (False, True):
                print(json.dumps(record(case, backward, facts)))
        return 0
    try:
        import torch
    except ImportError:
        print("peer not run: PyTorch is not installed")
        return 0
    if not hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        print(f"peer not run: PyTorch {torch.__version__} is older than 2.0")
        return 0
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    for case in cases:
        run_case(torch, case, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
