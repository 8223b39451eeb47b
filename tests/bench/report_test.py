"""report.py on canned records."""

import json
import os
import re
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import report  # noqa: E402


def attention(case, which, ms, impl="fast", **more):
    return {"op": "attention", "case": case, "pass": which, "impl": impl, "ms_median": ms, "threads": 1,
            "flops": 4e9, "peak_gflops": 100, **more}


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


class TablesTest(unittest.TestCase):
    def test_dense_attention_beside_its_peer(self):
        records = [attention("c", "forward", 80), attention("c", "backward", 160),
                   attention("c", "forward", 120, "torch_sdpa"), attention("c", "backward", 360, "torch_sdpa"),
                   {"op": "attention", "case": "c", "pass": None, "impl": "torch_flex", "ms_median": None}]
        forward, backward, both = cells(report.dense(records, {"forward": 0.5, "backward": 0.3},
                                                     {"forward": 2, "both": 2}))
        # 4 GFLOP in 80 ms are half of 100 GFLOP/s.
        self.assertEqual(forward[2:], ["80", "50", "50.0%", "met (>= 0.5)", "120", "33.3%", "1.50",
                                       "missed (>= 2)"])
        self.assertEqual(backward[4:6], ["25.0%", "missed (>= 0.3)"])
        self.assertEqual(both[-2:], ["2.00", "met (>= 2)"])
        alone = cells(report.dense(records[:2], {"forward": 0.5, "backward": 0.3}, {"forward": 2, "both": 2}))
        self.assertEqual([row[8] for row in alone], ["peer not run", "peer not run"])

    def test_sparse_time_is_compared_with_its_blocks(self):
        def r(case, time):
            return attention(case, "forward", 10, visible_fraction=0.1, block_fraction=0.2, time_fraction=time)
        rows = cells(report.sparse([attention("causal_x", "forward", 50), r("s2_x", 0.25), r("window_x", 0.25)]))
        self.assertEqual([row[0] for row in rows], ["s2_x", "window_x"])
        self.assertEqual([row[-2:] for row in rows], [["1.25", "missed (<= 1.2)"], ["1.25", "met (<= 1.3)"]])

    def test_moba_is_judged_by_both_passes_together(self):
        rows = cells(report.moba([attention("causal_x", "forward", 90), attention("causal_x", "backward", 150),
                                  attention("moba_x", "forward", 10, visible_fraction=0.05,
                                            shares={"gate": 0.25}),
                                  attention("moba_x", "backward", 20, visible_fraction=0.05)]))
        self.assertEqual(rows[0][4:7], ["9.00", "0.0500", "gate 25.0%"])
        self.assertEqual(rows[2][4], "8.00")
        self.assertEqual(rows[2][-1], "met (>= 8)")

    def test_threads_take_medians_of_their_runs(self):
        def r(threads, ms):
            return attention("c", "forward", ms) | {"threads": threads}
        rows = cells(report.threads([r(1, 100), r(2, 70), r(1, 110), r(2, 55), r(1, 108), r(2, 60)]))
        self.assertEqual(rows, [["c", "forward", "108", "60", "1.80", "met (>= 1.8)"]])

    def test_the_hybrid_step_is_compared_with_its_parts(self):
        def r(case, ms, attention_ms, blocks):
            return {"op": "step", "case": case, "impl": "bf16", "ms_median": ms, "attention_ms": attention_ms,
                    "block_fraction": blocks}
        records = [r("s2_hybrid_50m_T65536", 13000, 7000, 0.5), r("llama_50m_T65536", 3000, 1000, 1)]
        row, = cells(report.step_hybrid(records))
        # 6 s elsewhere and 12 x 0.5 x 1 s.
        self.assertEqual(row[4:], ["12.0", "1.083", "met (<= 1.15)"])
        self.assertEqual(report.step_hybrid(records[:1]), [report.NOT_MEASURED])

    def test_memory_may_be_off_either_way(self):
        def r(peak, recompute):
            return {"op": "step", "case": "m", "impl": "bf16", "ms_median": 1, "peak_bytes": peak,
                    "predicted_bytes": 100 << 20, "largest_tensor_bytes": 9 << 20, "peak_rss_bytes": 200 << 20,
                    "recompute": recompute}
        rows = cells(report.memory([r(114 << 20, 0), r(116 << 20, 1), r(84 << 20, 0)]))
        self.assertEqual([row[5] for row in rows], ["met", "missed", "missed"])
        self.assertEqual([row[1] for row in rows], ["NONE", "LAYER", "NONE"])

    def test_step_without_a_peer_says_so(self):
        record = {"op": "step", "case": "m", "impl": "bf16", "ms_median": 100, "attention_ms": 40,
                  "tokens_per_s": 5, "mfu": 0.5, "parameters": 7}
        self.assertIn("peer not run", report.step([record])[2])
        row, = cells(report.step([record | {"peer_ms_median": 160}]))
        self.assertEqual(row[-2:], ["1.60", "met (>= 1.5)"])


class ContextParallelTest(unittest.TestCase):
    def test_auto_is_compared_with_the_fastest_of_both_passes(self):
        def r(strategy, which, ms, impl=None):
            return {"op": "context_parallel", "mask": "s2", "strategy": strategy, "impl": impl or strategy, "ranks": 8,
                    "placement": "zigzag", "pass": which, "step_ms": ms, "compute_ms": ms, "exposed_ms": 0.5,
                    "bytes_planned": 1e6, "bytes_moved": 1e6, "lower_bound_bytes": 5e5, "dense_ring_bytes": 4e6,
                    "worst_rank_bytes": 2.5e5, "work_max_over_mean": 1, "predicted_ms": ms}
        records = [r("ring", "forward", 3), r("ring", "backward", 3), r("exchange", "forward", 1),
                   r("exchange", "backward", 4), r("auto", "forward", 2.9, "ring"), r("auto", "backward", 2.9, "ring")]
        tables = report.TABLES["cp_masks"](records)
        first, second = tables[:tables.index("")], tables[tables.index("") + 1:]
        self.assertEqual(cells(first)[0][3:9], ["ring", "1.0", "yes", "0.5", "25.0%", "50.0%"])
        self.assertEqual(cells(first)[0][-3:], ["3.000", "1.000", "3.00"])
        self.assertEqual(cells(second), [["s2", "8", "ring", "5.800", "exchange", "5.000", "1.160",
                                          "missed (<= 1.05)"]])

    def test_balance_is_judged_by_its_floor(self):
        def r(placement, work):
            return {"op": "context_parallel", "mask": "prefix", "ranks": 8, "placement": placement,
                    "work_max_over_mean": work, "balance_floor": 1.5, "bytes_planned": 1, "dense_ring_bytes": 4}
        row, = cells(report.TABLES["cp_balance"]([r("zigzag", 2), r("balanced", 1.53)]))
        self.assertEqual(row, ["prefix", "8", "-", "2.000", "-", "1.530", "1.500", "met (<= 1.03)", "-", "25.0%", "-",
                               "25.0%"])


class DocumentTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.doc = os.path.join(self.folder, "performance.md")
        self.texts = {}
        for doc in report.DOCS:
            with open(os.path.join(report.ROOT, "docs", doc), encoding="utf-8") as file:
                self.texts[doc] = file.read()
        with open(self.doc, "w", encoding="utf-8") as file:
            file.write(self.texts["performance.md"])

    def write(self, records):
        for section, lines in records.items():
            with open(os.path.join(self.folder, section + ".jsonl"), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        report.write(self.folder, self.doc)
        with open(self.doc, encoding="utf-8") as file:
            return file.read()

    def test_every_section_of_the_documents_has_commands(self):
        self.assertEqual(set(report.COMMANDS), set(report.TABLES))
        self.assertEqual({s for sections in report.DOCS.values() for s in sections}, set(report.TABLES))
        for doc, sections in report.DOCS.items():
            self.assertEqual(re.findall(r"<!-- (\w+) -->", self.texts[doc]), sections)
        for commands in report.COMMANDS.values():
            for command in commands:
                for path in re.findall(r"tests/\S+", command):
                    self.assertTrue(os.path.exists(os.path.join(report.ROOT, path)), path)

    def test_tables_replace_one_another(self):
        empty = self.write({})
        sections = len(report.DOCS["performance.md"])
        self.assertEqual(empty.count(report.NOT_MEASURED), sections)
        gemm = {"op": "gemm", "case": "gemm_x", "impl": "onednn", "ms_median": 2, "flops": 4e8,
                "peak_gflops": 400}
        peaks = {"op": "machine", "threads": 2, "f32_gflops": 200.0, "f32_set": "avx512", "bf16_gflops": 400.0,
                 "bf16_set": "avx512_bf16", "copy_gbps": 40.0, "implementations": ["onednn"]}
        filled = self.write({"gemm": [peaks, gemm, {"op": "revision", "commit": "1234abc+"}]})
        self.assertIn("| gemm_x | onednn | 2.00 | 200 | 50.0% |", filled)
        self.assertIn("2 threads: f32 200 GFLOP/s (avx512)", filled)
        self.assertIn("implementations: onednn; commit 1234abc+\n", filled)
        self.assertEqual(filled.count(report.NOT_MEASURED), sections - 1)
        os.remove(os.path.join(self.folder, "gemm.jsonl"))
        self.assertEqual(self.write({}), empty)

    def test_measuring_keeps_old_results_when_a_command_fails(self):
        out = os.path.join(self.folder, "gemm.jsonl")
        for program, status, kept in (("/bin/echo", 0, "bench gemm"), ("/bin/false", 1, "bench gemm")):
            run = subprocess.run([sys.executable, os.path.join(HERE, "report.py"), "measure", "--longspan", program,
                                  "--out", self.folder, "--only", "gemm"], capture_output=True, check=False)
            self.assertEqual(run.returncode, status, run.stderr)
            with open(out, encoding="utf-8") as file:
                kept_text = file.read()
            self.assertIn(kept, kept_text)
            self.assertRegex(kept_text, r'"op": "revision", "commit": "\w+\+?"')


if __name__ == "__main__":
    unittest.main()
