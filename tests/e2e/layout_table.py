"""One meaning, many layouts: the same run under mpirun in every layout equals that of one rank.

Without --full: 4 steps in F64, each strategy and each placement, at dp x cp = 1 x 2, 2 x 2 and 1 x 4.
With --full: 20 steps, F64 and F32, 2x1, 1x2, 2x2, 1x4 and 4x2, in each every strategy with a pattern
of its own and every placement in turn. ZeRO stages take turns in both.
With --quickstart: 20 steps of configs/quickstart.textproto in F32, every strategy at 1x2 and 1x4;
then 4 steps of it with short rows in F64 and every ZeRO stage, each of which must take less memory
than the one before and what `inspect` foretells.
Prints a table with tokens/s and fails when a row is outside its bound:

  F64  losses within 1e-10 relative; weights max|d| <= 1e-10 max|w| for each tensor
  F32  losses within 1e-5 relative; weights |d|_2 <= 1e-4 |w|_2 for each tensor
"""

import argparse
import itertools
import json
import statistics
import time

import e2e

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--full", action="store_true")
PARSER.add_argument("--quickstart", action="store_true")
PARSER.add_argument("--precision", default="F64,F32", help="of the full table")
ARGUMENTS = argparse.Namespace()

PLACEMENTS = ("CONTIGUOUS", "ZIGZAG", "STRIPED", "BALANCED")
# With what they need besides: nodes of two ranks, groups of two ranks.
STRATEGIES = {
    "RING": [],
    "ALL_GATHER": ["parallel.head_groups=2"],
    "ULYSSES": [],
    "EXCHANGE": [],
    "AUTO": [],
    "DOUBLE_RING": ["parallel.ranks_per_node=2"],
    "HYBRID": ["parallel.ulysses_ranks=2", "parallel.hybrid_outer=EXCHANGE"],
    "EXCHANGE nodes": ["parallel.ranks_per_node=2", "parallel.exchange_stages=3", "parallel.keep_keys_mib=64"],
}


def strategies_of(cp):
    """Those that `cp` ranks can have."""
    return [s for s, sets in STRATEGIES.items() if cp > 2 or not any("=2" in x and "head" not in x for x in sets)]

# model.layers and data.document_mask of each pattern. A window that ends inside a block, with sinks;
# S2 heads that see different blocks.
MIXERS = """\
  mixer { name: "dense" softmax { causal {} } }
  mixer { name: "window" softmax { window { window: 200 sinks: 3 } } }
  mixer { name: "s2" softmax { s2 { block_size: 64 local_blocks: 1 stride_blocks: 2 } } }
  mixer { name: "sigmoid" sigmoid { window { window: 200 sinks: 3 } } }
  layers: "%s"
"""
PATTERNS = {
    "causal": ("dense", "false"),
    "window": ("window", "false"),
    "s2": ("s2", "false"),
    "documents": ("dense s2", "true"),
    "sigmoid": ("sigmoid s2", "true"),
}
BOUNDS = {  # of losses and weights, and what is measured of the weights
    "F64": (1e-10, 1e-10, "max_difference", "max"),
    "F32": (1e-5, 1e-4, "norm_difference", "norm"),
}


class LayoutTable(e2e.TestCase):
    def config_of(self, pattern):
        if pattern == "quickstart":
            return e2e.SOURCE / "configs" / "quickstart.textproto"
        layers, documents = PATTERNS[pattern]
        # Mixers that no layer uses are refused.
        mixers = "".join(line + "\n" for line in MIXERS.splitlines()
                         if 'name: "' not in line or line.split('"')[1] in layers.split())
        lines = [line for line in e2e.CONFIG.splitlines()
                 if not line.strip().startswith(("mixer {", "layers:"))]
        text = "\n".join(lines).replace("  ffn_hidden_size: 64\n",
                                        "  ffn_hidden_size: 64\n" + mixers % layers)
        text = text.replace("data {\n", f"data {{\n  document_mask: {documents}\n")
        return self.write(f"{pattern}.textproto", text)

    def run_layout(self, pattern, precision, steps, dp, cp, placement, strategy, zero):
        run = self.folder / f"{pattern}-{precision}-{dp}x{cp}-{placement}-{strategy}-{zero}".replace(" ", "-")
        if pattern != "quickstart":
            own = ["run.global_batch_tokens=4096"]
        elif precision == "F64":  # whose attention is slow
            own = ["run.context_length=512", "run.global_batch_tokens=2048", "evaluation.rows=4",
                   "schedule.cosine.warmup_steps=2"]
        else:
            own = ["schedule.cosine.warmup_steps=2"]
        sets = [*own, f"run.precision={precision}", f"run.steps={steps}", f"parallel.dp={dp}",
                f"parallel.cp={cp}", f"parallel.placement={placement}",
                f"parallel.strategy={strategy.split()[0]}", f"parallel.zero_stage={zero}",
                *STRATEGIES[strategy], "checkpoint.every_steps=0", f"evaluation.every_steps={steps}"]
        start = time.monotonic()
        # One rank goes through mpirun too: the whole table runs the same way.
        self.run_ok(self.train_arguments(run, sets, config=self.config_of(pattern)), dp * cp)
        seconds = time.monotonic() - start
        forecast = json.loads(self.run_ok(["inspect", self.config_of(pattern), "--json",
                                           *(x for value in sets for x in ("--set", value))]).out)
        return (e2e.Metrics(run), run / "checkpoints" / f"step_{steps:08d}", seconds,
                forecast["memory_of_step"]["bytes"])

    def check(self, cases, precision, steps):
        """cases: (pattern, dp, cp, placement, strategy, ZeRO stage). Returns of each the bytes of
        tensors at their highest, on the rank that has most, and those that were foretold."""
        loss_bound, weight_bound, difference, size = BOUNDS[precision]
        print(f"\n{precision}, {steps} steps: losses within {loss_bound:g}, weights within "
              f"{weight_bound:g} ({difference} / {size})\n"
              f"{'pattern':10} {'dp x cp':8} {'placement':11} {'strategy':14} {'ZeRO':4} {'losses':>9} "
              f"{'weights':>9} {'tokens/s':>9} {'MB':>7} {'foretold':>8} {'seconds':>8}", flush=True)
        failures, memory = [], []
        for pattern, group in itertools.groupby(cases, key=lambda case: case[0]):
            one, one_checkpoint, seconds, _ = self.run_layout(pattern, precision, steps, 1, 1,
                                                           "CONTIGUOUS", "RING", 0)
            self.assertLess(one.losses()[-1], one.losses()[0], "the model does not learn")
            print(f"{pattern:10} 1 x 1    reference: loss {one.losses()[0]:.6f} -> "
                  f"{one.losses()[-1]:.6f} {seconds:41.1f}", flush=True)
            for _, dp, cp, placement, strategy, zero in group:
                got, checkpoint, seconds, forecast = self.run_layout(pattern, precision, steps, dp, cp,
                                                           placement, strategy, zero)
                losses = max(e2e.relative_difference(got.losses(), one.losses()),
                             e2e.relative_difference(got.evaluations.values(),
                                                     one.evaluations.values()))
                weights = max(t[difference] / t[size] if t[size] else float(t[difference] > 0)
                              for t in self.compare(one_checkpoint, checkpoint, "weights/"))
                valid = [[s["valid_tokens"] for s in m.steps] for m in (got, one)]
                good = losses <= loss_bound and weights <= weight_bound and valid[0] == valid[1]
                speed = statistics.median(s["tokens_per_s"] for s in got.steps)
                memory.append((max(s["peak_device_bytes"] for s in got.steps), forecast))
                row = (f"{pattern:10} {dp} x {cp}    {placement:11} {strategy:14} {zero:4} {losses:9.1e} "
                       f"{weights:9.1e} {speed:9.0f} {memory[-1][0] / 1e6:7.1f} {forecast / 1e6:8.1f} "
                       f"{seconds:8.1f}")
                print(row + ("" if good else "  FAILED"), flush=True)
                if not good:
                    failures.append(row)
        print(f"{precision}: {len(memory) - len(failures)} of {len(memory)} layouts within bounds",
              flush=True)
        self.assertEqual(failures, [])
        return memory

    def test_layouts(self):
        turn = itertools.count()

        def cases(layouts, some):
            """For each layout all its strategies; patterns, placements and stages take turns."""
            found = []
            for dp, cp in layouts:
                for strategy in strategies_of(cp) if cp > 1 else ["RING"]:
                    for _ in range(some):
                        n = next(turn)
                        found.append((list(PATTERNS)[n % len(PATTERNS)], dp, cp,
                                      PLACEMENTS[n // 2 % 4] if cp > 1 else "CONTIGUOUS", strategy, n % 4))
            return sorted(found, key=lambda case: list(PATTERNS).index(case[0]))

        if ARGUMENTS.quickstart:
            self.check([("quickstart", 1, cp, "ZIGZAG", strategy, 0)
                        for cp in (2, 4) for strategy in strategies_of(cp)], "F32", steps=20)
            for dp, cp in ((1, 2), (2, 2), (1, 4)):
                memory = self.check([("quickstart", dp, cp, "ZIGZAG", "EXCHANGE", zero)
                                     for zero in range(4)], "F64", steps=4)
                for zero, (measured, forecast) in enumerate(memory):
                    self.assertLess(abs(measured / forecast - 1), 0.05, f"ZeRO {zero}, {dp} x {cp}")
                    if zero > 0:
                        self.assertLess(measured, memory[zero - 1][0])
            return
        if ARGUMENTS.full:
            for precision in ARGUMENTS.precision.split(","):
                self.check(cases([(2, 1), (1, 2), (2, 2), (1, 4), (4, 2)], 3), precision, steps=20)
            return
        self.check(cases([(1, 2), (2, 2), (1, 4)], 1), "F64", steps=4)


if __name__ == "__main__":
    PARSER.parse_known_args(namespace=ARGUMENTS)
    e2e.main(PARSER)
