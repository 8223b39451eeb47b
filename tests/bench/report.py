#!/usr/bin/env python3
"""Measures the rows of docs/performance.md and docs/context-parallel.md, and writes their tables.

usage: report.py measure --longspan FILE --out FOLDER [--only SECTION]... [--python FILE]
       report.py write FOLDER [--docs FOLDER]

measure runs, with a program built of this tree, the commands of every section (PyTorch peers with --python) and keeps their JSON lines in
FOLDER/SECTION.jsonl. write puts commands and tables between the markers of the documents; a section
without results says that it was not measured.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys

import context_parallel_tables

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
NOT_MEASURED = "Not measured yet."

ATTENTION = "{longspan} bench attention --json --impl best"
STEP = "{longspan} bench step --json --threads 2 --seconds 0"
COMPARE = "{python} tests/bench/compare.py {op} --longspan {longspan} --out {out} --budget 3600"
LONG_DENSE = ("--problem tests/bench/problems/llama_50m.textproto --set run.context_length=65536 "
              "--set run.global_batch_tokens=65536 --set run.recompute=LAYER --set model.num_layers=1")


def comparison(op, *options):
    return " ".join([COMPARE.replace("{op}", op), *options])


COMMANDS = {
    "dense_bf16": [comparison("attention", "--threads 1 --rounds 3 --repeats 2 --seconds 0",
                              "--problem causal_bf16_T16384_Hq8_Hkv2_D128")],
    "dense_f32": [comparison("attention", "--threads 1 --rounds 3 --repeats 2 --seconds 0",
                             "--problem causal_f32_T16384_Hq8_Hkv2_D128")],
    "sparse": [f"{ATTENTION} --threads 2 --seconds 0 --repeats 5 "
               "--problem tests/bench/problems/goals_sparse_32k.txt",
               f"{ATTENTION} --threads 2 --seconds 0 --repeats 3 "
               "--problem tests/bench/problems/goals_sparse_128k.txt"],
    "moba": [f"{ATTENTION} --threads 2 --seconds 0 --repeats 3 "
             "--problem tests/bench/problems/goals_moba.txt"],
    "threads": [f"{ATTENTION} --threads {n} --seconds 0 --repeats 5 "
                "--problem tests/bench/problems/goals_threads.txt" for n in (1, 2, 1, 2)],
    "step": [comparison("step", "--threads 2 --rounds 3 --repeats 1 --seconds 0",
                        "--problem tests/bench/problems/llama_50m.textproto")],
    "step_hybrid": [f"{STEP} --repeats 1 --problem tests/bench/problems/s2_hybrid_50m.textproto",
                    f"{STEP} --repeats 1 {LONG_DENSE}"],
    "memory": [f"{STEP} --repeats 1 --problem tests/bench/problems/llama_50m.textproto",
               f"{STEP} --repeats 1 --problem tests/bench/problems/llama_50m.textproto "
               "--set run.recompute=LAYER"],
    "gemm": ["{longspan} bench gemm --json --threads 2"],
    "memory_bound": ["{longspan} bench memory --json --threads 2"],
    **context_parallel_tables.COMMANDS,
}


def read(folder, section):
    path = os.path.join(folder, section + ".jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.startswith("{")]


def timed(records, op):
    return [r for r in records if r.get("op") == op and r.get("ms_median")]


def ours(records):
    return [r for r in records if not str(r["impl"]).startswith("torch")]


def table(head, rows):
    if not rows:
        return [NOT_MEASURED]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(map(str, row)) + " |" for row in rows)]


def gflops(r):
    return r["flops"] / r["ms_median"] * 1e-6


def verdict(value, goal, at_least=True):
    met = value >= goal if at_least else value <= goal
    return f"{'met' if met else 'missed'} ({'>=' if at_least else '<='} {goal:g})"


def machine(records):
    peaks = [r for r in records if r.get("op") == "machine"]
    if not peaks:
        return []
    p = max(peaks, key=lambda r: r["bf16_gflops"])
    return [f"{p['threads']} thread{'s' if p['threads'] > 1 else ''}: f32 {p['f32_gflops']:.0f} GFLOP/s "
            f"({p['f32_set']}), bf16 {p['bf16_gflops']:.0f} GFLOP/s ({p['bf16_set']}), copy "
            f"{p['copy_gbps']:.1f} GB/s; implementations: {', '.join(p.get('implementations', []))}"
            + "".join(f"; commit {r['commit']}" for r in records if r.get("op") == "revision"), ""]


def dense(records, of_peak, times_peer):
    """Fractions of the peak (forward, backward) and times as fast as the peer (forward, both passes)."""
    measured = {r["pass"]: r for r in ours(timed(records, "attention"))}
    peer = {r["pass"]: r for r in timed(records, "attention")
            if r["impl"] == "torch_sdpa"}
    rows = []
    for which in ("forward", "backward"):
        if which not in measured:
            continue
        r, p = measured[which], peer.get(which)
        fraction = gflops(r) / r["peak_gflops"]
        speed_up = f"{p['ms_median'] / r['ms_median']:.2f}" if p else "peer not run"
        rows.append((which, r["impl"], f"{r['ms_median']:.0f}", f"{gflops(r):.0f}", f"{fraction:.1%}",
                     verdict(fraction, of_peak[which]), f"{p['ms_median']:.0f}" if p else "-",
                     f"{p and r['flops'] / p['ms_median'] * 1e-6 / r['peak_gflops'] or 0:.1%}" if p else "-",
                     speed_up, verdict(p["ms_median"] / r["ms_median"], times_peer["forward"])
                     if p and which == "forward" else ""))
    if len(measured) == 2 and len(peer) == 2:
        mine, theirs = (sum(x[w]["ms_median"] for w in x) for x in (measured, peer))
        rows.append(("both", "", f"{mine:.0f}", "", "", "", f"{theirs:.0f}", "", f"{theirs / mine:.2f}",
                     verdict(theirs / mine, times_peer["both"])))
    return table(("pass", "implementation", "ms", "GFLOP/s", "of peak", "goal", "PyTorch ms",
                  "PyTorch of peak", "times as fast", "goal"), rows)


def sparse(records):
    rows = []
    for r in ours(timed(records, "attention")):
        if r.get("time_fraction") is None:
            continue
        allowed = 1.3 if r["case"].startswith("window") else 1.2
        ratio = r["time_fraction"] / r["block_fraction"]
        rows.append((r["case"], r["pass"], r["impl"], f"{r['ms_median']:.0f}", f"{r['visible_fraction']:.4f}",
                     f"{r['block_fraction']:.4f}", f"{r['time_fraction']:.4f}", f"{ratio:.2f}",
                     verdict(ratio, allowed, at_least=False)))
    return table(("case", "pass", "implementation", "ms", "pairs of causal", "blocks of causal",
                  "time of causal", "time / blocks", "goal"), rows)


def moba(records):
    records = ours(timed(records, "attention"))
    routed = {r["pass"]: r for r in records if r["case"].startswith("moba")}
    causal = {r["pass"]: r for r in records if r["case"].startswith("causal")}
    rows = []
    for which, r in routed.items():
        shares = ", ".join(f"{part} {share:.1%}" for part, share in r.get("shares", {}).items())
        full = causal.get(which)
        rows.append((which, r["impl"], f"{r['ms_median']:.0f}", f"{full['ms_median']:.0f}" if full else "-",
                     f"{full['ms_median'] / r['ms_median']:.2f}" if full else "-",
                     f"{r['visible_fraction']:.4f}", shares, ""))
    if len(routed) == 2 and len(causal) == 2:
        mine, full = (sum(x[w]["ms_median"] for w in x) for x in (routed, causal))
        rows.append(("both", "", f"{mine:.0f}", f"{full:.0f}", f"{full / mine:.2f}", "", "",
                     verdict(full / mine, 8)))
    return table(("pass", "implementation", "ms", "causal ms", "times as fast", "pairs of causal", "shares",
                  "goal"), rows)


def threads(records):
    best = {}
    for r in ours(timed(records, "attention")):
        key = (r["case"], r["pass"], r["threads"])
        best.setdefault(key, []).append(r["ms_median"])
    median = {key: sorted(times)[len(times) // 2] for key, times in best.items()}
    rows = []
    for (case, which, n), one in median.items():
        if n == 1 and (two := median.get((case, which, 2))):
            rows.append((case, which, f"{one:.0f}", f"{two:.0f}", f"{one / two:.2f}",
                         verdict(one / two, 1.8)))
    return table(("case", "pass", "1 thread, ms", "2 threads, ms", "times as fast", "goal"), rows)


def step(records):
    rows = []
    for r in ours(timed(records, "step")):
        peer = r.get("peer_ms_median")
        rows.append((r["case"], f"{r['parameters']:.0f}", f"{r['ms_median']:.0f}", f"{r['tokens_per_s']:.0f}",
                     f"{r['mfu']:.1%}", f"{r['attention_ms'] / r['ms_median']:.0%}",
                     f"{peer:.0f}" if peer else "peer not run",
                     f"{peer / r['ms_median']:.2f}" if peer else "-",
                     verdict(peer / r["ms_median"], 1.5) if peer else "-"))
    return table(("model", "parameters", "ms a step", "tokens/s", "MFU", "in attention", "PyTorch ms",
                  "times as fast", "goal"), rows)


def step_hybrid(records):
    steps = ours(timed(records, "step"))
    hybrid = next((r for r in steps if r["case"].startswith("s2_hybrid")), None)
    layer = next((r for r in steps if r["case"].startswith("llama_50m")), None)
    if hybrid is None or layer is None:
        return [NOT_MEASURED]
    layers, dense_layer = 12, layer["attention_ms"]
    other = hybrid["ms_median"] - hybrid["attention_ms"]
    expected = other + layers * hybrid["block_fraction"] * dense_layer
    ratio = hybrid["ms_median"] / expected
    return table(("step, s", "other than attention, s", "dense attention of a layer, s", "layers x block fraction",
                  "expected step, s", "step / expected", "goal"),
                 [(f"{hybrid['ms_median'] * 1e-3:.1f}", f"{other * 1e-3:.1f}", f"{dense_layer * 1e-3:.2f}",
                   f"{layers} x {hybrid['block_fraction']:.4f}", f"{expected * 1e-3:.1f}", f"{ratio:.3f}",
                   verdict(ratio, 1.15, at_least=False))])


def memory(records):
    rows = []
    for r in ours(timed(records, "step")):
        if not r.get("predicted_bytes"):
            continue
        ratio = r["peak_bytes"] / r["predicted_bytes"]
        rows.append((r["case"], ("NONE", "LAYER", "ATTENTION_KEPT")[int(r["recompute"])], f"{r['peak_bytes'] / 2**20:.0f}",
                     f"{r['predicted_bytes'] / 2**20:.0f}", f"{ratio:.3f}",
                     "met" if abs(ratio - 1) <= 0.15 else "missed", f"{r['largest_tensor_bytes'] / 2**20:.0f}",
                     f"{r['peak_rss_bytes'] / 2**20:.0f}"))
    return table(("model", "recompute", "tensors at most, MiB", "predicted, MiB", "ratio", "goal (15 %)",
                  "largest tensor, MiB", "process, MiB"), rows)


def gemm(records):
    return table(("case", "implementation", "ms", "GFLOP/s", "of peak"),
                 [(r["case"], r["impl"], f"{r['ms_median']:.2f}", f"{gflops(r):.0f}",
                   f"{gflops(r) / r['peak_gflops']:.1%}") for r in timed(records, "gemm")])


def memory_bound(records):
    rows = []
    for r in timed(records, "memory"):
        rate = r["bytes"] / r["ms_median"] * 1e-6
        rows.append((r["case"], r["pass"], f"{r['ms_median']:.2f}", f"{rate:.1f}",
                     f"{rate / r['peak_gbps']:.0%}", verdict(rate / r["peak_gbps"], 0.7)))
    return table(("case", "pass", "ms", "GB/s", "of copy", "goal"), rows)


TABLES = {
    "dense_bf16": lambda r: dense(r, {"forward": 0.33, "backward": 0.23}, {"forward": 2, "both": 3}),
    "dense_f32": lambda r: dense(r, {"forward": 0.5, "backward": 0.4}, {"forward": 1, "both": 1}),
    "sparse": sparse, "moba": moba, "threads": threads, "step": step, "step_hybrid": step_hybrid,
    "memory": memory, "gemm": gemm, "memory_bound": memory_bound,
    **context_parallel_tables.sections(table),
}
# The sections of each document.
DOCS = {
    "performance.md": [s for s in TABLES if s not in context_parallel_tables.COMMANDS],
    "context-parallel.md": list(context_parallel_tables.COMMANDS),
}


def section_text(folder, section):
    records = read(folder, section)
    commands = [c.format(longspan="build/release/longspan", python="python3", out=f"{section}.jsonl")
                for c in dict.fromkeys(COMMANDS[section])]
    return "\n".join(["```", *commands, "```", "", *machine(records), *TABLES[section](records)])


def write(folder, doc):
    with open(doc, encoding="utf-8") as file:
        text = file.read()
    for section in DOCS[os.path.basename(doc)]:
        begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise SystemExit(f"{doc} has not one pair of markers for {section}")
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = before + begin + section_text(folder, section) + "\n" + end + after
    with open(doc, "w", encoding="utf-8") as file:
        file.write(text)


def revision():
    """The commit of this tree, with a + if it holds changes; --longspan is to be built of it."""
    git = ["git", "-C", ROOT]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return (commit.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def measure(arguments):
    os.makedirs(arguments.out, exist_ok=True)
    failed = 0
    for section in arguments.only or list(COMMANDS):
        path = os.path.join(arguments.out, section + ".jsonl")
        temporary = path + ".new"
        status = 0
        measured = revision()
        with open(temporary, "w", encoding="utf-8") as out:
            for command in COMMANDS[section]:
                words = [w.format(longspan=os.path.abspath(arguments.longspan), python=arguments.python,
                                  out=temporary) for w in shlex.split(command)]
                print(section, "$", " ".join(words), flush=True)
                own = "--out" in words  # it writes its records itself
                status = subprocess.run(words, cwd=ROOT, stdout=None if own else out, check=False).returncode
                out.flush()
                if status not in (0, 3):  # 3: the peer did not run
                    break
        if status in (0, 3):
            with open(temporary, "a", encoding="utf-8") as out:
                out.write(json.dumps({"op": "revision", "commit": measured}) + "\n")
            os.replace(temporary, path)
        else:
            failed += 1
            print(f"{section}: status {status}; what it wrote is in {temporary}")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    run = parts.add_parser("measure")
    run.add_argument("--longspan", required=True)
    run.add_argument("--out", required=True)
    run.add_argument("--only", action="append", choices=list(COMMANDS))
    run.add_argument("--python", default=sys.executable, help="one that has PyTorch")
    fill = parts.add_parser("write")
    fill.add_argument("folder")
    fill.add_argument("--docs", default=os.path.join(ROOT, "docs"))
    arguments = parser.parse_args()
    if arguments.part == "measure":
        return measure(arguments)
    for doc in DOCS:
        write(arguments.folder, os.path.join(arguments.docs, doc))
    return 0


if __name__ == "__main__":
    sys.exit(main())
