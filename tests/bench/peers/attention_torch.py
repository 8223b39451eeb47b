#!/usr/bin/env python3
"""PyTorch on the CPU, on the cases of `longspan bench attention`: scaled_dot_product_attention and
flex_attention (compiled, forward).

Prints one JSON object a line with the keys of `longspan bench --json`. Peaks and floors are those of
the other program, so they are null here; a back end that does not take a case has a line with
"refused". Without PyTorch 2.5 or newer it says so and exits 0.

usage: attention_torch.py [--problem NAME_OR_FILE]... [--filter S] [--pass forward|backward|both]
                          [--threads N] [--seconds S] [--repeats N] [--list | --serve]

--list prints the facts about each case (pairs, fractions, FLOPs) without running anything. --serve
reads one case name a line from standard input and answers with its records and a line {"done": name}.
"""

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import Case, Contest, Refused, answer, quantiles, read_names, record, say  # noqa: E402

LARGEST_MASK = 16384  # tokens; the masks of SDPA have their square
LARGEST_FLEX = 32768  # tokens; its block mask is made from a mask of all pairs
LARGEST_PLAIN_FLEX = 8192  # tokens; SDPA is there for longer ones without a mask
TOLERANCE = {"f32": 1e-4, "bf16": 2e-2, "f64": 1e-10}


def measure(run, seconds, repeats):
    """Median and 90th percentile in ms of at least `repeats` runs after one warm-up."""
    run()
    times, start = [], time.perf_counter()
    while len(times) < repeats or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return quantiles(times)


class Attention:
    """Operands of one case as [1, heads, T, D]; heads with equal masks are one call. For SDPA, K and V
    are repeated for the query heads of a group beforehand, which is not timed and is faster than its
    own handling of groups."""

    differentiable = True

    def __init__(self, torch, case):
        self.torch, self.case = torch, case
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f64": torch.float64}[case.dtype]
        generator = torch.Generator().manual_seed(1)

        def random(heads):
            shape = (1, heads, case.tokens, case.head_dim)
            return torch.randn(shape, generator=generator).to(dtype)

        self.q, self.k, self.v = (random(heads) for heads in (case.heads, case.kv_heads, case.kv_heads))
        self.gradient = random(case.heads)
        self.calls = self.make_calls()  # (function of operands, operands, gradient, first query head)
        for call in self.calls:
            for operand in call[1]:
                operand.requires_grad_(self.differentiable)
        with torch.no_grad():
            for call in self.calls:
                self.check(call[0](*call[1]), call[3])
        self.outputs = None

    def check(self, output, first):
        """Some rows against plain arithmetic with the mask of the case: a fast answer to another
        question is no peer."""
        torch, case = self.torch, self.case
        group = case.heads // case.kv_heads
        keys = torch.arange(case.tokens)
        for row in (0, case.tokens // 3, case.tokens - 1):
            kv = first // group
            scores = self.k[0, kv].double() @ self.q[0, first, row].double() / case.head_dim ** 0.5
            seen = case.visible(kv, torch.tensor(row), keys)
            expected = torch.softmax(scores.masked_fill(~seen, float("-inf")), 0) @ self.v[0, kv].double()
            error = (output[0, 0, row].double() - expected).norm() / expected.norm()
            if not error < TOLERANCE[case.dtype]:
                raise Refused(f"wrong: row {row} of head {first} is off by {float(error):.2g}")

    def forward(self):
        with self.torch.no_grad():
            for function, operands, _, _ in self.calls:
                function(*operands)

    def backward(self):
        if self.outputs is None:
            self.outputs = [function(*operands) for function, operands, _, _ in self.calls]
        for output, (_, operands, gradient, _) in zip(self.outputs, self.calls):
            self.torch.autograd.grad(output, operands, gradient, retain_graph=True)


class Sdpa(Attention):
    def make_calls(self):
        torch, case = self.torch, self.case
        if not case.plain and case.tokens > LARGEST_MASK:
            raise Refused(f"its mask of more than {LARGEST_MASK} tokens would not fit")
        group, calls = case.heads // case.kv_heads, []
        at = torch.arange(case.tokens)
        heads = case.kv_heads // len(case.distinct)  # kv heads of one call
        for n, head in enumerate(case.distinct):
            kv = slice(n * heads, (n + 1) * heads)
            query = slice(n * heads * group, (n + 1) * heads * group)
            mask = None if case.plain else case.visible(head, at[:, None], at[None, :])
            causal = case.plain and case.kind == "causal"
            operands = [self.q[:, query].clone(), self.k[:, kv].repeat_interleave(group, dim=1),
                        self.v[:, kv].repeat_interleave(group, dim=1)]

            def call(q, k, v, mask=mask, causal=causal):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask,
                                                                        is_causal=causal)
            calls.append((call, operands, self.gradient[:, query], query.start))
        return calls


class Flex(Attention):
    differentiable = False  # it refuses operands that need gradients on CPUs

    def make_calls(self):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        torch, case = self.torch, self.case
        largest = LARGEST_PLAIN_FLEX if case.plain else LARGEST_FLEX
        if case.tokens > largest:
            raise Refused(f"more than {largest} tokens")
        group = case.heads // case.kv_heads
        mask = create_block_mask(lambda _, head, q, k: case.visible(head // group, q, k), None,
                                 case.heads if len(case.distinct) > 1 else None, case.tokens,
                                 case.tokens, device="cpu", BLOCK_SIZE=64)
        compiled = torch.compile(flex_attention, dynamic=False)
        return [(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True),
                 [self.q, self.k, self.v], self.gradient, 0)]

    def backward(self):
        raise Refused("flex_attention has no backward pass on CPUs")


BACKENDS = {"sdpa": Sdpa, "flex": Flex}


def listed(case):
    """What --list says: the effective work, as the other program counts it."""
    pairs, visible, blocks = case.count()
    size = {"f32": 4, "bf16": 2, "f64": 8}[case.dtype]
    q = case.tokens * case.heads * case.head_dim
    rows = 3 if case.sigmoid else 4  # of q's size in the backward pass
    kv = 2 * case.tokens * case.kv_heads * case.head_dim
    for backward in (False, True):
        yield record("attention", case.name, "torch_sdpa", "backward" if backward else "forward", "cpu",
                     flops=4 * pairs * case.heads * case.head_dim * (2.5 if backward else 1),
                     bytes=((rows * q + 2 * kv) if backward else (2 * q + kv)) * size,
                     visible_fraction=visible, block_fraction=blocks)


def arguments_of(description):
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--filter", default="")
    parser.add_argument("--pass", dest="passes", default="both",
                        choices=["forward", "backward", "both"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if not arguments.problem:
        arguments.problem = [os.path.join(here, "..", "problems", "attention_default.txt")]
    return arguments


def main():
    arguments = arguments_of(__doc__.splitlines()[0])
    if arguments.list:
        for name in read_names(arguments.problem, arguments.filter):
            for line in listed(Case(name)):
                say(line)
        return 0
    try:
        import torch
    except ImportError:
        print("peer not run: PyTorch is not installed")
        return 0
    try:
        import torch.nn.attention.flex_attention  # noqa: F401
    except ImportError:
        print(f"peer not run: PyTorch {torch.__version__} is older than 2.5")
        return 0
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)

    def report(name, backend, which, **more):
        say(record("attention", name, "torch_" + backend, which, "cpu",
                   threads=torch.get_num_threads(), **more))

    contest = Contest(BACKENDS, lambda backend, case: BACKENDS[backend](torch, case),
                      lambda run: measure(run, arguments.seconds, arguments.repeats),
                      arguments.passes, report)
    if arguments.serve:
        answer(sys.stdin, torch.__version__, contest.run)
    else:
        for name in read_names(arguments.problem, arguments.filter):
            contest.run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
