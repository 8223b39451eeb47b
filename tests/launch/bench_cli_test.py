"""`longspan bench` and its peer script. usage: bench_cli_test.py PROGRAM REPOSITORY"""

import json
import math
import os
import subprocess

import cli_support
from cli_support import CliTest

KEYS = ["op", "case", "pass", "impl", "device", "threads", "ms_median", "ms_p90", "flops", "bytes",
        "visible_fraction", "block_fraction", "peak_gflops", "peak_gbps", "floor_ms",
        "fraction_of_floor", "peer", "peer_ms_median"]


def problems(name):
    return os.path.join(cli_support.REPOSITORY, "tests", "bench", "problems", name)


class BenchTest(CliTest):
    def records(self, *arguments):
        text = self.succeed("bench", *arguments, "--seconds", "0", "--json")
        machine, *records = [json.loads(line) for line in text.splitlines()]
        self.assertEqual(machine["op"], "machine")
        self.assertGreater(machine["bf16_gflops"], 0)
        if arguments[0] != "memory":
            self.assertIn("reference", machine["implementations"])
            self.assertTrue({r["impl"] for r in records} <= set(machine["implementations"]))
        for record in records:
            self.assertEqual([key for key in record if key not in ("time_fraction", "shares")], KEYS)
            self.assertGreater(record["ms_median"], 0)
            self.assertGreaterEqual(record["ms_p90"], record["ms_median"])
            self.assertGreater(record["peak_gflops"], 0)
            floor = max(record["flops"] / record["peak_gflops"],
                        record["bytes"] / record["peak_gbps"]) * 1e-6
            self.assertAlmostEqual(record["floor_ms"] / floor, 1)
            self.assertAlmostEqual(record["fraction_of_floor"] * record["ms_median"] / floor, 1)
            self.assertIsNone(record["peer"])
            self.assertIsNone(record["peer_ms_median"])
            self.assertEqual(record["device"], "cpu")
        return records

    def test_attention_smoke(self):
        records = self.records("attention", "--problem", problems("attention_smoke.txt"))
        cases = {r["case"] for r in records}
        self.assertEqual(len(cases), 13)
        for case in cases:
            passes = [r["pass"] for r in records if r["case"] == case]
            self.assertEqual(passes.count("forward"), passes.count("backward"), case)
            self.assertGreater(len(passes), 0)
        # The reference runs only where nothing else accepts the case.
        self.assertEqual({r["case"] for r in records if r["impl"] == "reference"},
                         {c for c in cases if "_f64_" in c})

    def test_work_agrees_with_the_peer_script(self):
        script = os.path.join(cli_support.REPOSITORY, "tests", "bench", "peers",
                              "attention_torch.py")
        arguments = ["--problem", problems("attention_smoke.txt")]
        listed = subprocess.run(["/usr/bin/python3", script, *arguments, "--list"], text=True,
                                capture_output=True, check=True, timeout=100)
        peers = {(p["case"], p["pass"]): p for p in map(json.loads, listed.stdout.splitlines())}
        records = self.records("attention", *arguments)
        self.assertEqual({(r["case"], r["pass"]) for r in records}, set(peers))
        for record in records:
            peer = peers[record["case"], record["pass"]]
            self.assertEqual(list(peer), KEYS)
            for key in ("flops", "visible_fraction", "block_fraction"):
                self.assertAlmostEqual(record[key] / peer[key], 1, msg=record["case"])

    def test_peer_script_without_torch(self):
        script = os.path.join(cli_support.REPOSITORY, "tests", "bench", "peers",
                              "attention_torch.py")
        # -S and -I: no installed packages, so that PyTorch is certainly absent.
        done = subprocess.run(["/usr/bin/python3", "-I", "-S", script], text=True,
                              capture_output=True, check=False, timeout=100)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout, "peer not run: PyTorch is not installed\n")

    def test_gemm_smoke(self):
        records = self.records("gemm", "--problem", problems("gemm_smoke.txt"), "--threads", "1")
        self.assertEqual({r["case"].split("_M")[0] for r in records},
                         {"gemm_f32", "gemm_bf16_forward", "gemm_bf16_dw", "gemm_f64_dx"})
        for record in records:
            self.assertEqual(record["threads"], 1)
            self.assertIsNone(record["visible_fraction"])
            backward = "_d" in record["case"]
            self.assertEqual(record["pass"], "backward" if backward else "forward")

    def test_memory_smoke(self):
        records = self.records("memory", "--problem", problems("memory_smoke.txt"))
        self.assertEqual(len({r["case"] for r in records}), 11)
        bytes_of = {(r["case"], r["pass"]): r["bytes"] for r in records}
        # By hand: x and y in bf16, w and rstd in f32; state read and written, gradient read, copy
        # written; f32 logits, labels, lse.
        self.assertEqual(bytes_of["rmsnorm_bf16_T130_D100", "forward"], 2 * 13000 * 2 + 4 * 230)
        self.assertEqual(bytes_of["adamw_bf16_N1003", "forward"], 1003 * (6 * 4 + 4 + 2))
        self.assertEqual(bytes_of["crossentropy_bf16_T37_V130", "forward"], 4 * (37 * 130 + 2 * 37))
        self.assertEqual(bytes_of["crossentropy_bf16_T37_V130", "backward"],
                         (4 + 2) * 37 * 130 + 8 * 37)
        self.assertEqual({r["flops"] for r in records}, {0})

    def test_step(self):
        with open(os.path.join(self.folder, "small.textproto"), "w", encoding="utf-8") as file:
            file.write("""run { steps: 9 context_length: 128 global_batch_tokens: 4096 precision: F32 }
                model { vocab_size: 300 hidden_size: 16 num_layers: 1 num_heads: 2 num_kv_heads: 1
                        ffn_hidden_size: 32 mixer { name: "a" softmax { causal {} } } layers: "a" }
                data { train { path: "none" } } parallel { cp: 2 }
                optimizer { adamw { lr: 1e-3 } } schedule { constant {} }""")
        text = self.succeed("bench", "step", "--problem", "small.textproto", "--seconds", "0", "--json",
                            "--set", "run.context_length=64")
        record = json.loads(text.splitlines()[1])
        more = ["parameters", "first_loss", "attention_ms", "recompute", "peak_bytes", "predicted_bytes",
                "largest_tensor_bytes", "peak_rss_bytes"]
        self.assertEqual(list(record), [*KEYS, "tokens_per_s", "mfu", *more])
        # The table of 300 words, the output projection, the layer with its two norms, the last norm.
        self.assertEqual(record["parameters"], 2 * 300 * 16 + 16 * 48 + 3 * 16 * 32 + 3 * 16)
        self.assertAlmostEqual(record["first_loss"], math.log(300), delta=0.1)
        self.assertLess(record["attention_ms"], record["ms_median"])
        self.assertLess(record["largest_tensor_bytes"], record["peak_bytes"])
        self.assertLess(record["peak_bytes"], record["peak_rss_bytes"])
        self.assertEqual((record["visible_fraction"], record["block_fraction"]), (1, 1))
        # 6 FLOP a matmul parameter and token (attention: 16 x (16 + 8 + 8 + 16), MLP: 3 x 16 x 32,
        # head: 300 x 16), 12 D a visible pair and head.
        parameters = 16 * 48 + 3 * 16 * 32 + 300 * 16
        self.assertEqual(record["flops"], 6 * parameters * 64 + 12 * 8 * 2 * 64 * 65 / 2)
        self.assertEqual(record["case"], "small_T64")
        self.assertAlmostEqual(record["tokens_per_s"] * record["ms_median"] / 64e3, 1)
        self.fail("bench", "step", "--problem", "nowhere.textproto", mentions=["nowhere.textproto"])

    def context_parallel(self, *arguments):
        text = self.succeed("bench", "context_parallel", "--json", *arguments)
        return [r for r in map(json.loads, text.splitlines()) if r["op"] == "context_parallel"]

    def test_context_parallel(self):
        more = ["mask", "strategy", "placement", "ranks", "ranks_per_node", "bytes_planned", "bytes_moved",
                "worst_rank_bytes", "lower_bound_bytes", "dense_ring_bytes", "work_max_over_mean",
                "balance_floor", "compute_ms", "exposed_ms", "step_ms", "predicted_ms", "plan_ms"]
        case = "causal_f32_T512_Hq4_Hkv2_D16"
        # Few FLOP/s, so that latencies do not decide everything.
        network = ["--problem", case, "--ranks", "4", "--tflops", "0.01", "--link-gbps", "0.5"]
        records = self.context_parallel(*network)
        kinds = ["ring", "all_gather", "ulysses", "hybrid", "exchange", "auto"]
        self.assertEqual([(r["strategy"], r["pass"]) for r in records],
                         [(kind, which) for kind in kinds for which in ("forward", "backward")])
        row = 2 * 16 * 4  # keys and values of one kv head and token
        for r in records:
            self.assertEqual(list(r), [*KEYS, *more])
            self.assertEqual((r["mask"], r["placement"], r["ranks"]), ("causal", "zigzag", 4))
            self.assertEqual(r["impl"] in kinds[:-1] if r["strategy"] == "auto" else r["impl"] == r["strategy"],
                             True)
            self.assertEqual(r["bytes_moved"], r["bytes_planned"])
            self.assertLessEqual(r["bytes_planned"] / 4, r["worst_rank_bytes"])
            self.assertAlmostEqual(r["predicted_ms"] / r["step_ms"], 1)
            self.assertLessEqual(max(r["compute_ms"], r["exposed_ms"]), r["step_ms"] * (1 + 1e-9))
            self.assertEqual(r["ms_median"], r["step_ms"])
            # 512 x 513 / 2 visible pairs of 4 heads over 4 ranks at 1e10 FLOP/s, work spread evenly.
            flops = (4 if r["pass"] == "forward" else 10) * 512 * 513 / 2 * 16
            self.assertEqual(r["flops"], flops)
            self.assertGreaterEqual(r["compute_ms"] * (1 + 1e-9), flops / 1e10 * 1e3)
            # Three hops of every shard; backward also gradients, of the same width in f32.
            hops = 3 * 512 * 2 * row
            self.assertEqual(r["dense_ring_bytes"] if r["pass"] == "forward" else hops, hops)
        by_kind = {(r["strategy"], r["pass"]): r for r in records}
        # Zigzag shards of 2 blocks of 64: rank r needs of each other one its first block, and the second
        # where it comes before the rank's own second: 6, 5, 4, 3 of 8 blocks.
        blocks = sum(3 + (3 - r) for r in range(4))
        self.assertEqual(by_kind["exchange", "forward"]["bytes_moved"], blocks * 64 * 2 * row)
        self.assertEqual(by_kind["exchange", "forward"]["lower_bound_bytes"], blocks * 64 * 2 * row)
        # Modelled time is the same again, whatever this machine does.
        again = self.context_parallel(*network)
        for one, other in zip(records, again):
            self.assertEqual({**one, "plan_ms": 0}, {**other, "plan_ms": 0})

    def test_options_of_context_parallel(self):
        case = ["--problem", "causal_f32_T512_Hq4_Hkv2_D16", "--strategy", "ring", "--pass", "forward"]
        time = lambda *more: self.context_parallel(*case, "--ranks", "2", "--plan-only", *more)[0]["step_ms"]
        # Two messages of 64 KiB at 1 GB/s, no computing to speak of: one after the other on a ring of 2.
        network = ["--tflops", "1e9", "--link-gbps", "1"]
        wire = 256 * 2 * 2 * 16 * 4 / 1e6
        self.assertAlmostEqual(time(*network, "--latency-us", "0"), wire)
        self.assertAlmostEqual(time(*network, "--latency-us", "1000"), wire + 1)
        self.assertAlmostEqual(time(*network), wire + 0.01)
        self.assertEqual(self.context_parallel(*case, "--ranks", "1", "--dense-ring-time", "1")[0]["bytes_moved"], 0)
        for option in ("--tflops", "--link-gbps", "--node-gbps"):
            self.fail("bench", "context_parallel", *case, option, "0", mentions=[f"{option} 0 must be above 0"])
        both = cli_support.run("bench", "context_parallel", *case, "--dense-ring-time", "1", "--link-gbps", "1")
        self.assertNotEqual(both.returncode, 0)
        self.assertTrue("--link-gbps excludes --dense-ring-time" in both.stderr, both.stderr)
        self.fail("bench", "context_parallel", *case, "--strategy", "star", mentions=["star", "all_gather"])
        self.fail("bench", "attention", "--ranks", "2", mentions=["--ranks"])

    def test_trace(self):
        self.succeed("bench", "gemm", "--problem", "gemm_f32_M40_N40_K40", "--seconds", "0", "--json",
                     "--trace", "trace.json")
        with open(os.path.join(self.folder, "trace.json"), encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        self.assertGreaterEqual([e["name"] for e in events].count("gemm"), 6)

    def test_choices(self):
        case = "causal_f32_T130_Hq2_Hkv2_D16"
        records = self.records("attention", "--problem", case, "--pass", "forward", "--impl",
                               "reference")
        self.assertEqual([(r["case"], r["pass"], r["impl"]) for r in records],
                         [(case, "forward", "reference")])
        records = self.records("attention", "--problem", case, "--impl", "best")
        self.assertEqual([r["pass"] for r in records], ["forward", "backward"])
        records = self.records("attention", "--problem", problems("attention_smoke.txt"),
                               "--filter", "_W100_S10", "--pass", "backward")
        self.assertEqual({(r["case"].split("_")[0], r["pass"]) for r in records},
                         {("window", "backward")})

    def test_table(self):
        text = self.succeed("bench", "attention", "--problem", "causal_f32_T130_Hq2_Hkv2_D16",
                            "--seconds", "0", "--pass", "forward")
        lines = text.splitlines()
        self.assertIn("peaks of", lines[0])
        self.assertIn("GFLOP/s", lines[0])
        self.assertIn("portable, reference", lines[1])
        head = lines.index("") + 1
        for column in ("case", "pass", "impl", "ms median", "GFLOP/s", "per thread", "floor ms"):
            self.assertIn(column, lines[head])
        self.assertTrue(lines[head + 1].startswith("causal_f32_T130_Hq2_Hkv2_D16  forward"), lines)
        self.assertEqual({len(line) for line in lines[head:]}, {len(lines[head])})

    def test_machine(self):
        machine = json.loads(self.succeed("bench", "machine", "--json", "--threads", "1",
                                          "--seconds", "0.01"))
        self.assertEqual(machine["op"], "machine")
        self.assertEqual(machine["threads"], 1)
        for key in ("f32_gflops", "bf16_gflops", "copy_gbps"):
            self.assertGreater(machine[key], 0.1, key)
        self.fail("bench", "machine", "--problem", "x", mentions=["--problem", "machine"])
        self.fail("bench", "gemm", "--set", "run.steps=3", mentions=["--set", "gemm"])
        self.fail("bench", "step", "--impl", "onednn", mentions=["--impl", "step"])
        self.fail("bench", "memory", "--long", mentions=["--long", "memory"])
        self.fail("bench", "machine", "--repeats", "3", mentions=["--repeats", "machine"])

    def test_sparse_cases_are_compared_with_the_dense_one(self):
        shape = "f32_T300_Hq2_Hkv2_D16"
        records = self.records("attention", "--problem", f"causal_{shape}", "--problem",
                               f"window_{shape}_W64", "--repeats", "7", "--impl", "portable")
        dense = {r["pass"]: r for r in records if r["case"].startswith("causal")}
        for record in records[2:]:
            self.assertAlmostEqual(record["time_fraction"] * dense[record["pass"]]["ms_median"],
                                   record["ms_median"])
        self.assertNotIn("time_fraction", records[0])
        # Sigmoid with sigmoid, in the same rounds.
        records = self.records("attention", "--problem", f"causal_{shape}", "--problem",
                               f"sigmoid_window_{shape}_W64", "--problem", f"sigmoid_causal_{shape}",
                               "--problem", f"window_{shape}_W64", "--impl", "portable")
        median = {(r["case"].rsplit("_f32")[0], r["pass"]): r["ms_median"] for r in records}
        self.assertEqual(len(median), 8)
        for record in records:
            kind, which = record["case"].rsplit("_f32")[0], record["pass"]
            self.assertEqual("time_fraction" in record, "window" in kind, kind)
            if "window" in kind:
                self.assertAlmostEqual(record["time_fraction"] * median[kind.replace("window", "causal"), which],
                                       record["ms_median"])
        # A row of moba follows its shares.
        text = self.succeed("bench", "attention", "--problem", f"moba_{shape}_B64_K2", "--seconds", "0",
                            "--pass", "forward")
        self.assertRegex(text.splitlines()[-1], r"^ +gate .* %, lists .* %, gather .* %, attention .* %$")

    def test_bad_names(self):
        self.fail("bench", "attention", "--problem", "causal_f16_T64_Hq1_Hkv1_D8",
                  mentions=["causal_f16_T64_Hq1_Hkv1_D8", '"f16"', "bf16"])
        self.fail("bench", "attention", "--problem", "sigmoid_moba_f32_T64_Hq1_Hkv1_D8_B64_K2",
                  mentions=["sigmoid_moba_f32_T64_Hq1_Hkv1_D8_B64_K2", "softmax only"])
        self.fail("bench", "gemm", "--problem", "gemm_f32_M4_N4", mentions=["K is missing"])
        # The second of two; nothing may be timed before it is found.
        self.fail("bench", "gemm", "--problem", "gemm_f32_M4_N4_K4", "--problem", "gemm_f32_M4_Q4",
                  "--json", mentions=['"gemm_f32_M4_Q4"'])
        self.fail("bench", "attention", "--filter", "no-such-case", mentions=["no-such-case"])
        self.fail("bench", "gemm", "--problem", "gemm_f32_M4_N4_K4", "--impl", "quick", "--json",
                  mentions=["quick", "onednn", "reference"])
        with open(os.path.join(self.folder, "empty.txt"), "w", encoding="utf-8") as file:
            file.write("# nothing\n")
        self.fail("bench", "gemm", "--problem", "empty.txt", mentions=["empty.txt"])

    def test_usage_errors(self):
        for arguments in (["bench", "nothing"], ["bench"], ["bench", "gemm", "--pass", "sideways"],
                          ["bench", "gemm", "--threads", "-1"],
                          ["bench", "gemm", "--long", "--problem", "gemm_f32_M4_N4_K4"]):
            self.assertEqual(cli_support.run(*arguments).returncode, 2, arguments)


if __name__ == "__main__":
    cli_support.main()
