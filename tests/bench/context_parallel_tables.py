"""Tables of docs/context-parallel.md from the lines of `longspan bench context_parallel --json`."""

LIST = "tests/bench/problems/context_parallel_long.txt"
BENCH = "{longspan} bench context_parallel --json"
# One node of 8 ranks, links as fast as the rule of the goal says.
GOAL = f"{BENCH} --ranks 8 --dense-ring-time 1"
S2 = "s2_bf16_T131072_Hq16_Hkv8_D128_B64_L16_V8"
DOCUMENTS = "causal_bf16_T131072_Hq16_Hkv8_D128_P5000"

COMMANDS = {
    "cp_goal": [f"{GOAL} --problem {S2} --problem {DOCUMENTS}"],
    "cp_masks": [f"{GOAL} --plan-only --problem {LIST}"],
    "cp_nodes": [f"{BENCH} --plan-only --ranks 16,64 --ranks-per-node 8 --problem {S2} "
                 f"--problem {DOCUMENTS} --problem causal_bf16_T131072_Hq16_Hkv8_D128"],
    "cp_balance": [f"{BENCH} --plan-only --strategy exchange --pass forward --ranks 8,64 "
                   f"--placement contiguous,zigzag,striped,balanced --problem {LIST}"],
}


def lines(records):
    return [r for r in records if r.get("op") == "context_parallel"]


def share(part, whole):
    return f"{part / whole:.1%}" if whole else "-"


def megabytes(value):
    return f"{value * 1e-6:.1f}"


def by(records, *keys):
    """Records in groups of equal keys, in the order of each group's first one."""
    groups = {}
    for r in records:
        groups.setdefault(tuple(r[k] for k in keys), []).append(r)
    return groups


def name_of(r):
    return r["strategy"] if r["strategy"] != "auto" else f"auto: {r['impl']}"


def strategies(table, records):
    """What each strategy moves and how long it takes, both passes."""
    rows = []
    for (mask, ranks, _, which), group in by(lines(records), "mask", "ranks", "placement", "pass").items():
        fastest = min(r["step_ms"] for r in group if r["strategy"] != "auto") if len(group) > 1 else None
        for r in group:
            moved = r.get("bytes_moved")
            rows.append((mask, int(ranks), which, name_of(r), megabytes(r["bytes_planned"]),
                         "-" if moved is None else "yes" if moved == r["bytes_planned"] else megabytes(moved),
                         megabytes(r["lower_bound_bytes"]), share(r["bytes_planned"], r["dense_ring_bytes"]),
                         share(r["worst_rank_bytes"] * r["ranks"], r["dense_ring_bytes"]),
                         f"{r['work_max_over_mean']:.3f}", f"{r['compute_ms']:.3f}", f"{r['exposed_ms']:.3f}",
                         share(r["exposed_ms"], r["step_ms"]), f"{r['step_ms']:.3f}",
                         f"{r['step_ms'] / r['predicted_ms']:.3f}" if moved is not None else "-",
                         f"{r['step_ms'] / fastest:.2f}" if fastest else "-"))
    return table(("mask", "P", "pass", "strategy", "MB planned", "moved the same", "MB at least", "of dense ring",
                  "worst rank", "work max/mean", "compute ms", "exposed ms", "exposed", "step ms",
                  "step / predicted", "step / fastest"), rows)


def auto(table, records):
    """Whether auto is within 5 % of the fastest, both passes together."""
    rows = []
    for (mask, ranks), group in by(lines(records), "mask", "ranks").items():
        total = {}
        for r in group:
            total[r["strategy"]] = total.get(r["strategy"], 0) + r["step_ms"]
        if "auto" not in total or len(total) < 2:
            continue
        chosen = next(r["impl"] for r in group if r["strategy"] == "auto")
        best = min((t, s) for s, t in total.items() if s != "auto")
        ratio = total["auto"] / best[0]
        rows.append((mask, int(ranks), chosen, f"{total['auto']:.3f}", best[1], f"{best[0]:.3f}", f"{ratio:.3f}",
                     "met (<= 1.05)" if ratio <= 1.05 else "missed (<= 1.05)"))
    return table(("mask", "P", "auto takes", "ms", "fastest", "ms", "auto / fastest", "goal"), rows)


def balance(table, records):
    rows = []
    for (mask, ranks), group in by(lines(records), "mask", "ranks").items():
        of = {r["placement"]: r for r in group}
        floor = max(1, group[0]["balance_floor"])
        balanced = of["balanced"]["work_max_over_mean"] / floor if "balanced" in of else None
        rows.append((mask, int(ranks), *(f"{of[p]['work_max_over_mean']:.3f}" if p in of else "-"
                                    for p in ("contiguous", "zigzag", "striped", "balanced")), f"{floor:.3f}",
                     "-" if balanced is None else "met (<= 1.03)" if balanced <= 1.03 else "missed (<= 1.03)",
                     *(share(of[p]["bytes_planned"], of[p]["dense_ring_bytes"]) if p in of else "-"
                       for p in ("contiguous", "zigzag", "striped", "balanced"))))
    return table(("mask", "P", "contiguous", "zigzag", "striped", "balanced", "floor", "goal",
                  "bytes contiguous", "zigzag", "striped", "balanced"), rows)


def sections(table):
    """Section name -> function of its records that returns the lines of its tables."""
    def both(records):
        choices = auto(table, records) if lines(records) else []
        return [*strategies(table, records), *([""] if choices else []), *choices]
    return {"cp_goal": both, "cp_masks": both, "cp_nodes": both,
            "cp_balance": lambda records: balance(table, records)}
