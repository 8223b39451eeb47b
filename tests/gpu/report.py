"""What tests/gpu/run.py makes of the output of other programs: verdicts and the table at the end."""

import json
import math
import os
import re

PASSED, FAILED, INCOMPLETE = "passed", "failed", "incomplete"
PARTIAL = "partial"  # of measurements: those that are there hold
UNAVAILABLE, NO_GPU, NOT_RUN = "not available here", "no GPU", "not run"
GOOD = (PASSED, PARTIAL, UNAVAILABLE)

GTEST_END = re.compile(r"\[\s+(OK|FAILED|SKIPPED)\s+\] (\S+?),?(?: where .*)? \(\d+ ms\)")
GTEST_RUN = re.compile(r"\[ RUN      \] (\S+)")
GTEST_TOTAL = re.compile(r"\[==========\] Running (\d+) tests? from")


def judge_gtest(lines, status, timed_out):
    """(result, detail) of one or several shards of a GoogleTest program whose lines are mixed."""
    total = sum(int(m.group(1)) for line in lines if (m := GTEST_TOTAL.match(line)))
    ended = {m.group(2): m.group(1) for line in lines if (m := GTEST_END.match(line))}
    started = [m.group(1) for line in lines if (m := GTEST_RUN.match(line))]
    count = {kind: sum(e == kind for e in ended.values()) for kind in ("OK", "FAILED", "SKIPPED")}
    failed = [name for name, kind in ended.items() if kind == "FAILED"]
    hanging = [name for name in started if name not in ended]
    text = f"{count['OK']} of {total} tests passed"
    if count["SKIPPED"]:
        text += f", {count['SKIPPED']} skipped themselves"
    if failed:
        return FAILED, f"{text}; failed: {', '.join(failed[:5])}{' ...' if len(failed) > 5 else ''}"
    if timed_out:
        return INCOMPLETE, f"{text}, none failed before the time was up" + (
            f" (during {hanging[0]})" if hanging else "")
    if hanging:
        return FAILED, f"{text}; ended with status {status} during {hanging[0]}"
    if status != 0:
        return FAILED, f"{text}; status {status}"
    if count["OK"] == 0 or count["OK"] + count["SKIPPED"] != total:
        return FAILED, text
    return PASSED, text


REFUSED = re.compile(r"(device not supported|not supported on this (device|system)|unable to (find|attach|connect)"
                     r"|failed to (initialize|attach|connect)|no attachable process|insufficient permission"
                     r"|internal sanitizer error)", re.I)
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


def judge_sanitizer(lines, status, timed_out):
    """(result, detail) of compute-sanitizer around the tests. Its refusals are no verdict on kernels."""
    found = [int(m.group(1) or m.group(2)) for line in lines if (m := SUMMARY.search(line))]
    tests, detail = judge_gtest(lines, status, timed_out)
    if any(found):
        return FAILED, f"{sum(found)} errors; {detail}"
    refusal = next((line.strip() for line in lines if REFUSED.search(line)), None)
    if refusal and tests != PASSED:
        return UNAVAILABLE, refusal.lstrip("= ")[:120]
    if timed_out:
        return INCOMPLETE, detail
    if not found:
        return FAILED, f"no summary; {detail}"
    return tests, f"0 errors; {detail}"


def read_jsonl(path):
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return []
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            pass  # the line that was being written when the program was killed
    return records


def losses(run_directory):
    """{step: loss} of a run."""
    return {r["step"]: r["loss"] for r in read_jsonl(os.path.join(run_directory, "metrics.jsonl"))
            if "loss" in r and "eval" not in r}


def judge_curves(ours, reference, tolerance, steps):
    """(result, detail, points): the largest relative difference of two loss curves over `steps` steps."""
    expected = list(range(1, steps + 1))
    for name, curve in (("this", ours), ("the reference", reference)):
        if sorted(curve) != expected:
            return FAILED, f"{name} run has {len(curve)} of {steps} steps", []
    points = [{"step": s, "loss": ours[s], "reference": reference[s]} for s in expected]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for p in points for x in p.values()):
        return FAILED, "a loss is not finite", points
    worst = max(points, key=lambda p: abs(p["loss"] - p["reference"]) / abs(p["reference"]))
    difference = abs(worst["loss"] - worst["reference"]) / abs(worst["reference"])
    if len(set(reference.values())) < steps // 2:
        return FAILED, "the reference curve stands still", points
    return (PASSED if difference <= tolerance else FAILED,
            f"largest relative difference {difference:.2e} at step {worst['step']} (allowed {tolerance:g})",
            points)


def number(value, form):
    return "-" if value is None else format(value, form)


def speed(record):
    """Tokens of a step, TFLOP/s where arithmetic is counted, otherwise GB/s."""
    if record.get("tokens_per_s"):
        return f"{record['tokens_per_s']:.0f} tokens/s, MFU {number(record.get('mfu'), '.1%')}"
    if record.get("flops"):
        return f"{record['flops'] / record['ms_median'] * 1e-9:.1f} TFLOP/s"
    if record.get("bytes"):
        return f"{record['bytes'] / record['ms_median'] * 1e-6:.0f} GB/s"
    return "-"


def aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def measurements(records):
    """One row a record that has a time."""
    rows = [("op", "case", "pass", "impl", "ms", "speed", "of floor", "fastest peer", "peer ms",
             "times as fast")]
    for r in records:
        if r.get("ms_median") is None:
            continue
        peer = r.get("peer_ms_median")
        rows.append((str(r.get("op")), str(r.get("case")), str(r.get("pass")), str(r.get("impl")),
                     number(r["ms_median"], ".3f"), speed(r), number(r.get("fraction_of_floor"), ".0%"),
                     str(r.get("peer") or "-"), number(peer, ".3f"),
                     number(peer / r["ms_median"] if peer else None, ".2f")))
    return aligned(rows) if len(rows) > 1 else []


def machine(records):
    """The peaks that the program measured by itself."""
    return [", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in r.items() if value is not None and key != "op")
            for r in records if r.get("op") == "machine"]


def sparse_gain(records):
    """For S2 and windows: the speed-up over causal of the same shape, as a share of what the blocks
    that are left would allow."""
    def shape(case):
        return re.sub(r"^[^_]*_|_[BLVWN]\d+", "", case)

    ours = [r for r in records if r.get("op") == "attention" and r.get("ms_median")
            and not str(r.get("impl")).startswith("torch_")]
    dense = {(shape(r["case"]), r["pass"], r["impl"]): r["ms_median"] for r in ours
             if r["case"].startswith("causal_")}
    lines = []
    for r in ours:
        base = dense.get((shape(r["case"]), r["pass"], r["impl"]))
        if base and r.get("block_fraction") and not r["case"].startswith("causal_"):
            gain, allowed = base / r["ms_median"], 1 / r["block_fraction"]
            lines.append(f"{r['case']} {r['pass']} {r['impl']}: {gain:.2f} times causal, "
                         f"{gain / allowed:.0%} of what its blocks allow ({allowed:.2f})")
    return lines


def table(out, facts):
    """The text of table.txt."""
    results = read_jsonl(os.path.join(out, "results.jsonl"))
    bench = read_jsonl(os.path.join(out, "bench.jsonl"))
    peers = read_jsonl(os.path.join(out, "peers.jsonl"))
    rows = [("part", "check", "result", "s", "detail")]
    rows += [(r["part"], r["check"], r["result"], f"{r['seconds']:.0f}", r["detail"]) for r in results]
    sections = [[f"{name}: {value}" for name, value in facts.items()], aligned(rows)]
    for title, records in (("measured alone", bench), ("in turns with peers", peers)):
        if lines := machine(records):
            sections.append(lines)
        if lines := measurements(records):
            sections.append([title, *lines])
        if lines := sparse_gain(records):
            sections.append(lines)
    refused = sorted({f"{r['case']}: {r['impl']} refused: {r['refused']}" for r in peers if r.get("refused")})
    if refused:
        sections.append(refused)
    return "\n\n".join("\n".join(section) for section in sections) + "\n"
