#!/usr/bin/env python3
"""PyTorch on a GPU on the cases of `longspan bench attention`, after two thermometers of the machine: a
copy (bytes read and written) and a bf16 product.

Prints one JSON object a line with the keys of `longspan bench --json`; floors and the facts about a
case are those of the other program, so they are null here. A back end that does not take a case gives
a line with "refused" instead of times. Without PyTorch or a GPU it says "peer not run" and exits 0.

usage: gpu.py [--problem NAME_OR_FILE]... [--filter S] [--pass forward|backward|both] [--seconds S]
       gpu.py --serve      one case name a line on standard input; after its records comes {"done": NAME}.
                           Operands and compiled kernels of the last case are kept, so that rounds of the
                           same case, between rounds of another program, only measure.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from common import Contest, Refused, answer, quantiles, read_names, record, say  # noqa: E402

LONGEST_SPARSE = 32768  # tokens; beyond it the mask of flex_attention alone takes minutes
FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU
SHORT_MS = 1.0  # runs shorter than this start with that cache overwritten
TOLERANCE = 2e-2  # bf16 rows against f32


def measure(torch, run, seconds):
    """Median and 90th percentile in ms by the device's clock, of at least 5 runs."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    run()
    times, total = [], 0.0
    while len(times) < 5 or (total < seconds * 1e3 and len(times) < 1000):
        if not times or times[-1] < SHORT_MS:
            scratch.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        total += times[-1]
    return quantiles(times)


class Attention:
    """One back end on one case: operands [1, heads, T, D], compiled once."""

    def __init__(self, torch, case, backend):
        self.torch, self.case, self.backend = torch, case, backend
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16}.get(case.dtype)
        if dtype is None:
            raise Refused(f"{case.dtype} is not timed on a GPU")
        generator = torch.Generator(device="cuda").manual_seed(1)

        def random(heads):
            shape = (1, heads, case.tokens, case.head_dim)
            return torch.randn(shape, generator=generator, device="cuda").to(dtype)

        self.operands = [random(heads).requires_grad_()
                         for heads in (case.heads, case.kv_heads, case.kv_heads)]
        self.gradient = random(case.heads)
        self.call = self.flex() if backend.startswith("flex") else self.fused()
        self.output = None
        with torch.no_grad():
            self.check(self.call())

    def fused(self):
        """scaled_dot_product_attention with one of its kernels, which know causal and full masks."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        case = self.case
        if case.kind not in ("causal", "full") or case.document != case.tokens:
            raise Refused("its masks are causal or none")
        chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[self.backend]

        def call():
            with sdpa_kernel(chosen):
                return self.torch.nn.functional.scaled_dot_product_attention(
                    *self.operands, is_causal=case.kind == "causal", enable_gqa=True)
        return call

    def flex(self):
        """flex_attention, with mask blocks as large as its name ends."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        case, block = self.case, int(self.backend[len("flex"):])
        if case.tokens > LONGEST_SPARSE:
            raise Refused(f"more than {LONGEST_SPARSE} tokens")
        group = case.heads // case.kv_heads
        step = max(1, case.size["V"] // case.kv_heads) if case.kind == "s2" else 0

        if case.kind not in ("causal", "window", "s2") or case.document != case.tokens or "N" in case.size:
            raise Refused("not one of the patterns written for it here")
        mask = create_block_mask(lambda _, head, q, k: case.visible(head // group, q, k), None,
                                 case.heads if step else None, case.tokens, case.tokens,
                                 device="cuda", BLOCK_SIZE=block, _compile=True)
        compiled = self.torch.compile(flex_attention, dynamic=False)
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64,
                 "BLOCK_N2": 64} if block == 64 else None
        return lambda: compiled(*self.operands, block_mask=mask, enable_gqa=True, kernel_options=tiles)

    def check(self, output):
        """Some rows of every kv group against plain f32 arithmetic with the mask of attention_torch: a
        fast answer to another question is no peer."""
        torch, case = self.torch, self.case
        q, k, v = (x.detach() for x in self.operands)
        keys = torch.arange(case.tokens, device="cuda")
        group = case.heads // case.kv_heads
        for kv_head in range(case.kv_heads):
            head = kv_head * group + group - 1
            for row in (0, case.tokens // 3, case.tokens - 1):
                scores = k[0, kv_head].float() @ q[0, head, row].float() / case.head_dim ** 0.5
                at = torch.tensor(row, device="cuda")
                scores = scores.masked_fill(~case.visible(kv_head, at, keys), float("-inf"))
                expected = torch.softmax(scores, 0) @ v[0, kv_head].float()
                error = (output[0, head, row].float() - expected).norm() / expected.norm()
                if not error < TOLERANCE:
                    raise Refused(f"wrong: row {row} of head {head} is off by {float(error):.2g}")

    def forward(self):
        with self.torch.no_grad():
            self.call()

    def backward(self):
        if self.output is None:
            self.output = self.call()
        self.torch.autograd.grad(self.output, self.operands, self.gradient, retain_graph=True)


BACKENDS = ("flash", "cudnn", "flex64", "flex128")


def report(torch, name, implementation, which, op="attention", **more):
    say(record(op, name, "torch_" + implementation, which, torch.cuda.get_device_name(0), threads=0,
               **more))


def thermometers(torch, seconds):
    a = torch.randn(1 << 28, device="cuda")
    b = torch.empty_like(a)
    median, p90 = measure(torch, lambda: b.copy_(a), seconds)
    report(torch, "copy_1GiB", "copy", "forward", op="copy", bytes=2 * a.numel() * a.element_size(),
           ms_median=median, ms_p90=p90)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    median, p90 = measure(torch, lambda: a @ b, seconds)
    report(torch, f"gemm_bf16_M{n}_N{n}_K{n}", "matmul", "forward", op="gemm", flops=2.0 * n ** 3,
           ms_median=median, ms_p90=p90)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", action="append", default=[])
    parser.add_argument("--filter", default="")
    parser.add_argument("--pass", dest="passes", default="both",
                        choices=["forward", "backward", "both"])
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if not arguments.problem:
        arguments.problem = [os.path.join(here, "..", "problems", "attention_gpu.txt")]
    try:
        import torch
    except ImportError:
        print("peer not run: PyTorch is not installed")
        return 0
    if not torch.cuda.is_available():
        print("peer not run: PyTorch sees no CUDA device")
        return 0
    thermometers(torch, arguments.seconds)

    def make(backend, case):
        torch.cuda.empty_cache()
        return Attention(torch, case, backend)

    contest = Contest(BACKENDS, make, lambda run: measure(torch, run, arguments.seconds), arguments.passes,
                      lambda *fields, **more: report(torch, *fields, **more))
    if arguments.serve:
        answer(sys.stdin, torch.__version__, contest.run)
    else:
        for name in read_names(arguments.problem, arguments.filter):
            contest.run(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
