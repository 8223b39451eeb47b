"""tests/gpu/run.sh with scripts in place of the programs, and its verdicts on canned output."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
sys.dont_write_bytecode = True
import report  # noqa: E402

GREEN = """[==========] Running 3 tests from 2 test suites.
[ RUN      ] GemmTest.Smoke
[       OK ] GemmTest.Smoke (12 ms)
[ RUN      ] All/AttentionTest.Forward/0
[       OK ] All/AttentionTest.Forward/0 (3 ms)
[ RUN      ] All/AttentionTest.Forward/1
[       OK ] All/AttentionTest.Forward/1 (0 ms)
[==========] 3 tests from 2 test suites ran. (15 ms total)
[  PASSED  ] 3 tests.
"""
RED = GREEN.replace("[       OK ] All/AttentionTest.Forward/1 (0 ms)",
                    "x.cu:7: Failure\n[  FAILED  ] All/AttentionTest.Forward/1, where GetParam() = (1, 2) (0 ms)")
CUT = GREEN[:GREEN.index("[       OK ] All/AttentionTest.Forward/1")]
MEMCHECK = "========= COMPUTE-SANITIZER\n" + GREEN + "========= ERROR SUMMARY: 0 errors\n"
RACECHECK = MEMCHECK.replace("ERROR SUMMARY: 0 errors",
                             "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
REFUSAL = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


class Verdicts(unittest.TestCase):
    def gtest(self, text, status=0, timed_out=False):
        return report.judge_gtest(text.splitlines(), status, timed_out)

    def sanitizer(self, text, status=0, timed_out=False):
        return report.judge_sanitizer(text.splitlines(), status, timed_out)

    def test_gtest(self):
        self.assertEqual(self.gtest(GREEN), (report.PASSED, "3 of 3 tests passed"))
        result, detail = self.gtest(RED, 1)
        self.assertEqual(result, report.FAILED)
        self.assertIn("failed: All/AttentionTest.Forward/1", detail)

    def test_gtest_of_shards_with_mixed_lines(self):
        a, b = GREEN.splitlines(), GREEN.replace("Test.", "Other.").splitlines()
        mixed = [line for pair in zip(a, b) for line in pair]
        self.assertEqual(report.judge_gtest(mixed, 0, False), (report.PASSED, "6 of 6 tests passed"))

    def test_gtest_that_did_not_end(self):
        result, detail = self.gtest(CUT, -9, True)
        self.assertEqual((result, detail), (
            report.INCOMPLETE,
            "2 of 3 tests passed, none failed before the time was up (during All/AttentionTest.Forward/1)"))
        result, detail = self.gtest(CUT, -11)
        self.assertEqual(result, report.FAILED)
        self.assertIn("status -11 during All/AttentionTest.Forward/1", detail)

    def test_gtest_that_ran_nothing_or_failed_outside_of_tests(self):
        self.assertEqual(self.gtest("[==========] Running 0 tests from 0 test suites.\n")[0], report.FAILED)
        self.assertEqual(self.gtest("")[0], report.FAILED)
        self.assertEqual(self.gtest(GREEN, 1)[0], report.FAILED)
        skipped = GREEN.replace("[       OK ] GemmTest.Smoke", "[  SKIPPED ] GemmTest.Smoke")
        self.assertEqual(self.gtest(skipped), (report.PASSED, "2 of 3 tests passed, 1 skipped themselves"))

    def test_sanitizer(self):
        self.assertEqual(self.sanitizer(MEMCHECK)[0], report.PASSED)
        result, detail = self.sanitizer(RACECHECK, 86)
        self.assertEqual((result, detail[:8]), (report.FAILED, "2 errors"))
        self.assertEqual(self.sanitizer(REFUSAL, 1),
                         (report.UNAVAILABLE, "Error: Device not supported. Please refer to the documentation"))
        self.assertEqual(self.sanitizer(GREEN)[0], report.FAILED)  # no summary: it did not look
        self.assertEqual(self.sanitizer("========= COMPUTE-SANITIZER\n" + CUT, -9, True)[0],
                         report.INCOMPLETE)

    def test_curves(self):
        reference = {s: 5.0 - 0.01 * s for s in range(1, 51)}
        close = {s: loss * (1 + 5e-5) for s, loss in reference.items()}
        self.assertEqual(report.judge_curves(close, reference, 1e-4, 50)[0], report.PASSED)
        self.assertEqual(report.judge_curves({**close, 30: 4.8}, reference, 1e-4, 50)[0], report.FAILED)
        self.assertEqual(report.judge_curves({**close, 30: None}, reference, 1e-4, 50)[0], report.FAILED)
        self.assertEqual(report.judge_curves({**close, 30: float("nan")}, reference, 1e-4, 50)[0],
                         report.FAILED)
        del close[50]
        self.assertEqual(report.judge_curves(close, reference, 1e-4, 50)[0], report.FAILED)
        still = dict.fromkeys(reference, 5.0)
        self.assertEqual(report.judge_curves(still, still, 1e-4, 50)[0], report.FAILED)

    def test_sparse_gain(self):
        def record(case, ms, blocks):
            return {"op": "attention", "case": case, "pass": "forward", "impl": "mma_bf16", "ms_median": ms,
                    "block_fraction": blocks}

        lines = report.sparse_gain([record("causal_bf16_T8192_Hq32_Hkv8_D128", 8.0, 1.0),
                                    record("s2_bf16_T8192_Hq32_Hkv8_D128_B64_L16_V8", 2.5, 0.25),
                                    record("s2_bf16_T4096_Hq32_Hkv8_D128_B64_L16_V8", 2.5, 0.25)])
        self.assertEqual(lines, ["s2_bf16_T8192_Hq32_Hkv8_D128_B64_L16_V8 forward mma_bf16: 3.20 times causal, "
                                 "80% of what its blocks allow (4.00)"])


FAKE_TESTS = """#!{python}
import os, sys, time
if "{mode}" == "no_gpu":
    sys.exit("--device=cuda: no GPU: the driver is not installed")
if "--gtest_list_tests" in sys.argv:
    sys.exit(0)
print(open(os.path.dirname(os.path.abspath(__file__)) + "/gtest").read(), flush=True)
if "{mode}" == "hang":
    time.sleep(100)
"""
# Trains to a curve that depends on nothing but the step and, for "wrong", on the device.
FAKE_LONGSPAN = """#!{python}
import json, os, sys
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
if sys.argv[1:] == ["bench", "--help"]:
    print("machine, attention, gemm, memory, step; --device")
elif sys.argv[1:] == ["train", "--help"]:
    print("--local-ranks")
elif sys.argv[1] == "bench":
    print(json.dumps({{"op": sys.argv[2], "case": "c", "pass": "forward", "impl": "i", "flops": 4e9,
                      "ms_median": 2.0, "fraction_of_floor": 0.5}}))
elif sys.argv[1] == "train":
    os.makedirs(option("--run-dir"), exist_ok=True)
    wrong = 0.01 if "{mode}" == "wrong" and "run.device=CUDA" in sys.argv else 0
    with open(option("--run-dir") + "/metrics.jsonl", "w") as file:
        for step in range(1, 51):
            print(json.dumps({{"step": step, "loss": 5 - 0.01 * step + wrong}}), file=file)
        print(json.dumps({{"step": 50, "eval": "validation_loss", "value": 1.0}}), file=file)
"""


class WholeRuns(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.out = os.path.join(self.directory.name, "out")

    def tearDown(self):
        self.directory.cleanup()

    def start(self, *arguments, mode="", gtest=GREEN):
        for name, text in (("longspan", FAKE_LONGSPAN), ("tests", FAKE_TESTS)):
            path = os.path.join(self.directory.name, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text.format(python=sys.executable, mode=mode))
            os.chmod(path, 0o755)
        with open(os.path.join(self.directory.name, "gtest"), "w", encoding="utf-8") as file:
            file.write(gtest)
        environment = dict(os.environ, OUT=self.out, LONGSPAN=os.path.join(self.directory.name, "longspan"),
                           LONGSPAN_GPU_TESTS=os.path.join(self.directory.name, "tests"))
        return subprocess.Popen([os.path.join(HERE, "run.sh"), *arguments], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run_script(self, *arguments, **options):
        child = self.start(*arguments, **options)
        output = child.communicate(timeout=60)[0]
        return child.returncode, output, self.results()

    def results(self):
        return {(r["part"], r["check"]): r["result"]
                for r in report.read_jsonl(os.path.join(self.out, "results.jsonl"))}

    def test_without_a_gpu_every_part_says_so_and_the_table_is_left(self):
        status, output, results = self.run_script(mode="no_gpu")
        self.assertEqual(status, 1)
        self.assertEqual(len(results), 6)
        self.assertEqual(set(results.values()), {"no GPU"})
        self.assertIn("the driver is not installed", output)
        with open(os.path.join(self.out, "table.txt"), encoding="utf-8") as file:
            self.assertEqual(file.read().count("no GPU  "), 6)
        self.assertLessEqual(len(os.listdir(self.out)), 6)

    def test_green_and_red_tests(self):
        status, _, results = self.run_script("smoke")
        self.assertEqual((status, results), (0, {("smoke", "one case per kernel"): "passed"}))
        status, output, results = self.run_script("smoke", gtest=RED)
        self.assertEqual((status, set(results.values())), (1, {"failed"}))
        self.assertIn("All/AttentionTest.Forward/1", output)

    def test_a_part_ends_with_its_time(self):
        start = time.monotonic()
        status, _, results = self.run_script("smoke", "--budget", "2", mode="hang", gtest=CUT)
        self.assertEqual((status, set(results.values())), (1, {"incomplete"}))
        self.assertLess(time.monotonic() - start, 20)

    def test_results_of_a_killed_run_are_kept_and_its_children_end(self):
        child = self.start("bench", "smoke", mode="hang")
        for _ in range(100):
            time.sleep(0.1)
            if "GemmTest" in open(os.path.join(self.out, "log.txt"), encoding="utf-8").read() \
                    if os.path.exists(os.path.join(self.out, "log.txt")) else False:
                break
        child.send_signal(signal.SIGTERM)
        self.assertIn("stopped by signal", child.communicate(timeout=20)[0])
        self.assertEqual(child.returncode, 1)

    def test_measurements_and_table(self):
        status, output, results = self.run_script("bench")
        self.assertEqual((status, set(results.values())), (0, {"passed"}))
        self.assertIn("2.0 TFLOP/s", output)
        self.assertEqual(len(results), 5)

    def test_step(self):
        status, output, results = self.run_script("step", gtest=GREEN)
        self.assertEqual(set(results.values()), {"passed"}, output)
        self.assertEqual(status, 0)
        self.assertEqual(len(results), 10)  # six strategies among them
        lines = report.read_jsonl(os.path.join(self.out, "step.jsonl"))
        self.assertEqual(len(lines), 9 * 50)

    def test_step_with_other_curves_on_the_gpu(self):
        status, _, results = self.run_script("step", mode="wrong")
        self.assertEqual(status, 1)
        self.assertEqual(results["step", "CPU and CUDA, F32"], "failed")
        self.assertEqual(results["step", "CPU and CUDA, BF16"], "passed")  # 0.2 %: within bf16's bound
        self.assertEqual(results["step", "4 ranks, RING"], "passed")

    def test_unknown_parts_are_refused(self):
        status, output, _ = self.run_script("smoek")
        self.assertEqual(status, 2)
        self.assertIn("there is no part smoek", output)


if __name__ == "__main__":
    unittest.main()
