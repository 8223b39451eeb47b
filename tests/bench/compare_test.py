"""compare.py with two small programs in place of longspan and the peers."""

import json
import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import compare  # noqa: E402

# Each run takes the next time of the list in the file "times"; the order of all runs is noted.
OURS = """#!{python}
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
case = sys.argv[sys.argv.index("--problem") + 1]
if case == "bad":
    sys.exit("longspan: no such case")
times = open(here + "/times").read().split()
open(here + "/times", "w").write(" ".join(times[1:]))
open(here + "/order", "a").write("o")
print(json.dumps({{"op": "machine", "copy_gbps": 10 / float(times[0]), "device": "x"}}))
if sys.argv[2] == "step":
    print(json.dumps({{"op": "step", "case": "s", "pass": "both", "impl": "bf16", "ms_median": float(times[0]),
                      "floor_ms": 1.0, "tokens_per_s": 12 / float(times[0]), "parameters": 7,
                      "first_loss": 2.3}}))
    sys.exit(0)
for which, factor in (("forward", 1), ("backward", 3)):
    print(json.dumps({{"op": "attention", "case": case, "pass": which, "impl": "mma_bf16", "flops": 5.0,
                      "ms_median": float(times[0]) * factor, "ms_p90": 9.0, "floor_ms": 1.0}}))
"""
PEER = """#!{python}
import json, os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
if {silent}:
    print("peer not run: PyTorch is not installed")
    sys.exit(0)
print(json.dumps({{"op": "copy", "case": "copy_1GiB", "impl": "torch_copy", "pass": "forward"}}))
print(json.dumps({{"ready": "2.11"}}), flush=True)
for line in sys.stdin:
    case = line.strip()
    open(here + "/order", "a").write("p")
    if "--set" in sys.argv:
        print(json.dumps({{"op": "step", "case": "s", "pass": "both", "impl": "torch", "ms_median": 8.0,
                          "tokens_per_s": 1.5, "parameters": 7 if case == "same" else 8, "vocab_size": 10,
                          "first_loss": 2.4}}))
        print(json.dumps({{"done": case}}), flush=True)
        continue
    if case == "slow":
        time.sleep(60)
    if case == "crash":
        sys.exit(1)
    for impl, ms in (("flash", 4.0), ("cudnn", 3.0)):
        print(json.dumps({{"op": "attention", "case": case, "pass": "forward", "impl": impl, "ms_median": ms,
                          "ms_p90": ms}}))
    print(json.dumps({{"op": "attention", "case": case, "pass": None, "impl": "flex", "ms_median": None,
                      "refused": "no"}}))
    print(json.dumps({{"done": case}}), flush=True)
"""


class CompareTest(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.at = lambda name: os.path.join(self.directory.name, name)

    def tearDown(self):
        self.directory.cleanup()

    def run_compare(self, cases, times="5 1 2", silent=False, budget=20, options=("--device", "cuda")):
        for name, text in (("ours", OURS), ("peer", PEER)):
            with open(self.at(name), "w", encoding="utf-8") as file:
                file.write(text.format(python=sys.executable, silent=silent))
            os.chmod(self.at(name), 0o755)
        with open(self.at("times"), "w", encoding="utf-8") as file:
            file.write(times)
        run = subprocess.run(
            [sys.executable, os.path.join(HERE, "compare.py"), *options, "--longspan", self.at("ours"), "--peer",
             self.at("peer"), "--out", self.at("out"), "--budget", str(budget),
             *[word for case in cases for word in ("--problem", case)]],
            capture_output=True, text=True, check=False)
        with open(self.at("out"), encoding="utf-8") as file:
            return run.returncode, run.stdout + run.stderr, [json.loads(line) for line in file]

    def test_rounds_alternate_and_medians_are_joined_with_the_fastest_peer(self):
        status, _, records = self.run_compare(["c"])
        self.assertEqual(status, 0)
        with open(self.at("order"), encoding="utf-8") as file:
            self.assertEqual(file.read(), "opopop")
        ours = {r["pass"]: r for r in records if r.get("impl") == "mma_bf16"}
        self.assertEqual(ours["forward"]["ms_median"], 2.0)
        self.assertEqual(ours["forward"]["fraction_of_floor"], 0.5)
        self.assertEqual((ours["forward"]["peer"], ours["forward"]["peer_ms_median"]), ("cudnn", 3.0))
        self.assertEqual(ours["forward"]["rounds"], 3)
        self.assertEqual(ours["backward"]["ms_median"], 6.0)
        self.assertNotIn("peer", ours["backward"])
        self.assertEqual([r["flops"] for r in records if r.get("impl") == "flash"], [5.0])
        self.assertEqual([r["rounds"] for r in records if r.get("impl") == "flex"], [0])
        self.assertEqual([r["case"] for r in records if r["op"] == "copy"], ["copy_1GiB"])

    def test_without_peers_ours_is_measured_and_the_reason_is_said(self):
        status, output, records = self.run_compare(["c"], silent=True)
        self.assertEqual(status, 3)
        self.assertIn("peer not run: PyTorch is not installed", output)
        self.assertEqual([r.get("impl") for r in records], [None, "mma_bf16", "mma_bf16"])

    def test_what_was_measured_before_the_budget_ended_is_kept(self):
        status, output, records = self.run_compare(["c", "slow"], times="5 1 2 1 1 1", budget=4)
        self.assertEqual(status, 3)
        self.assertIn("out of time: 1 of 2 cases", output)
        self.assertEqual({r["case"] for r in records if r["op"] == "attention"}, {"c"})

    def test_a_peer_that_dies_is_not_waited_for(self):
        status, output, records = self.run_compare(["crash"])
        self.assertEqual(status, 3)
        self.assertIn("its program ended during crash", output)
        self.assertEqual([r["rounds"] for r in records if r.get("impl") == "mma_bf16"], [3, 3])

    def test_our_own_failure_is_an_error(self):
        status, output, _ = self.run_compare(["bad", "c"])
        self.assertEqual(status, 1)
        self.assertIn("bad: longspan: no such case", output)

    def test_the_quietest_peaks_are_written_once_a_case(self):
        _, _, records = self.run_compare(["c"])
        self.assertEqual([(r["copy_gbps"], r["device"]) for r in records if r["op"] == "machine"],
                         [(10.0, "x")])

    def test_steps_of_the_same_model_are_compared(self):
        options = ("step", "--set", "run.precision=BF16")
        status, output, records = self.run_compare(["same"], options=options)
        self.assertEqual(status, 0, output)
        ours = next(r for r in records if r.get("impl") == "bf16")
        self.assertEqual((ours["ms_median"], ours["tokens_per_s"], ours["peer"], ours["peer_ms_median"]),
                         (2.0, 6.0, "torch", 8.0))
        status, output, records = self.run_compare(["other"], options=options)
        self.assertEqual(status, 1)
        self.assertIn("s: 7 parameters, but torch has 8", output)
        self.assertEqual(len([r for r in records if r["op"] == "step"]), 2, "those of the first run only")

    def test_untrained_losses_must_be_near_log_of_the_vocabulary(self):
        def check(ours, theirs):
            compare.check_same_model([{"case": "s", "parameters": 7, "first_loss": ours}],
                                     [{"impl": "p", "parameters": 7, "first_loss": theirs, "vocab_size": 10}])
        check(2.3, 2.32)
        for bad in ((2.0, 2.3), (2.3, 2.6), (float("nan"), 2.3)):
            with self.assertRaises(RuntimeError):
                check(*bad)

    def test_problem_files(self):
        def names(*words):
            return compare.names_of(compare.arguments_of([*words, "--longspan", "x", "--out", "y"]))
        self.assertEqual(len(names("attention", "--device", "cuda")), 9)
        self.assertEqual(names("attention", "--problem", "x"), ["x"])
        self.assertTrue(names("step")[0].endswith("llama_50m.textproto"))


if __name__ == "__main__":
    unittest.main()
