#!/usr/bin/env python3
"""What an NVIDIA GPU and PyTorch on it reach: the figures that Longspan's CUDA path is measured against.

Prints one JSON object a line: {"op", "case", "pass", "impl", "device", "ms_median", "ms_p90", "tflops",
"gbps"}. Needs Python with a CUDA build of PyTorch; says so and exits 0 without one.

usage: peers.py [--seconds S] [--quick]
"""

import argparse
import json
import statistics
import sys


def measure(torch, run, seconds):
    """Median and 90th percentile in ms over event-timed runs after a warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, total = [], 0.0
    while len(times) < 10 or total < seconds * 1e3:
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        total += times[-1]
        if len(times) >= 2000:
            break
    times.sort()
    return statistics.median(times), times[-(-9 * len(times) // 10) - 1]


class Report:
    def __init__(self, torch, seconds):
        self.torch, self.seconds = torch, seconds
        self.device = torch.cuda.get_device_name(0)

    def case(self, op, name, passes, impl, run, flops=0.0, moved=0.0):
        try:
            median, p90 = measure(self.torch, run, self.seconds)
        except Exception as error:  # a peer that refuses a case is a fact worth printing
            print(json.dumps({"op": op, "case": name, "pass": passes, "impl": impl,
                              "device": self.device,
                              "refused": str(error).splitlines()[0][:160]}), flush=True)
            return
        print(json.dumps({
            "op": op, "case": name, "pass": passes, "impl": impl, "device": self.device,
            "ms_median": round(median, 4), "ms_p90": round(p90, 4),
            "tflops": round(flops / median * 1e-9, 1) if flops else None,
            "gbps": round(moved / median * 1e-6, 1) if moved else None}), flush=True)


def bench_copy(torch, report):
    for mib in (256, 1024):
        a = torch.randn(mib << 18, device="cuda")
        b = torch.empty_like(a)
        report.case("copy", f"copy_{mib}MiB", "forward", "torch", lambda: b.copy_(a),
                    moved=2.0 * a.numel() * 4)


def bench_gemm(torch, report):
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, name, sizes in ((torch.bfloat16, "bf16", (4096, 8192)), (torch.float32, "f32", (4096,))):
        for n in sizes:
            a = torch.randn(n, n, device="cuda", dtype=dtype)
            b = torch.randn(n, n, device="cuda", dtype=dtype)
            report.case("gemm", f"gemm_{name}_M{n}_N{n}_K{n}", "forward", "cublas",
                        lambda: a @ b, flops=2.0 * n ** 3)


def causal_pairs(tokens):
    return tokens * (tokens + 1) / 2


def bench_sdpa(torch, report, lengths):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    attention = torch.nn.functional.scaled_dot_product_attention
    for tokens in lengths:
        for heads, kv_heads, dim in ((32, 8, 128), (32, 8, 64)):
            name = f"causal_bf16_T{tokens}_Hq{heads}_Hkv{kv_heads}_D{dim}"
            make = lambda h: torch.randn(1, h, tokens, dim, device="cuda", dtype=torch.bfloat16,
                                         requires_grad=True)
            q, k, v = make(heads), make(heads), make(heads)  # keys repeated: no peer kernel refuses
            gradient = torch.randn_like(q)
            flops = 4.0 * causal_pairs(tokens) * heads * dim
            for impl, backend in (("sdpa_flash", SDPBackend.FLASH_ATTENTION),
                                  ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)):
                def forward(backend=backend):
                    with sdpa_kernel(backend):
                        return attention(q, k, v, is_causal=True)

                with torch.no_grad():
                    report.case("attention", name, "forward", impl, forward, flops=flops)
                try:
                    out = forward()
                except RuntimeError:
                    continue
                report.case("attention", name, "backward", impl,
                            lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True),
                            flops=2.5 * flops)


def bench_flex(torch, report, lengths):
    """S2 (block 64, 16 local blocks, stride 8, 8 kv heads) as a FlexAttention mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex = torch.compile(flex_attention, dynamic=False)
    block, local, stride, heads, kv_heads, dim = 64, 16, 8, 32, 8, 128

    def rule(_, h, q, k):
        near = (q // block - k // block) < local
        far = (k // block + h // (heads // kv_heads)) % stride == 0
        return (k <= q) & (near | far)

    for tokens in lengths:
        mask = create_block_mask(rule, 1, heads, tokens, tokens, device="cuda", _compile=True)
        make = lambda h: torch.randn(1, h, tokens, dim, device="cuda", dtype=torch.bfloat16,
                                     requires_grad=True)
        q, k, v = make(heads), make(kv_heads), make(kv_heads)
        gradient = torch.randn_like(q)
        pairs = 0
        for h in range(kv_heads):
            rows = torch.arange(tokens // block)
            sees = ((rows[:, None] - rows[None, :]) < local) | ((rows[None, :] + h) % stride == 0)
            sees &= rows[None, :] < rows[:, None]
            pairs += int(sees.sum()) * block * block + len(rows) * block * (block + 1) // 2
        flops = 4.0 * pairs / kv_heads * heads * dim
        name = f"s2_bf16_T{tokens}_Hq{heads}_Hkv{kv_heads}_D{dim}_B{block}_L{local}_V{stride}"
        run = lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)
        with torch.no_grad():
            report.case("attention", name, "forward", "flex_attention", run, flops=flops)
        try:
            out = run()
        except Exception:
            continue
        report.case("attention", name, "backward", "flex_attention",
                    lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True),
                    flops=2.5 * flops)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--quick", action="store_true", help="8192 tokens only")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("peer not run: PyTorch is not installed")
        return 0
    if not torch.cuda.is_available():
        print("peer not run: PyTorch sees no CUDA device")
        return 0
    torch.manual_seed(1)
    report = Report(torch, arguments.seconds)
    print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                      "device": report.device}), flush=True)
    lengths = (8192,) if arguments.quick else (8192, 32768)
    bench_copy(torch, report)
    bench_gemm(torch, report)
    bench_sdpa(torch, report, lengths)
    bench_flex(torch, report, lengths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
