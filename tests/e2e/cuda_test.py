"""`run.device: CUDA` of the whole program, on the emulated GPU of tests/emulated_cuda, against the
same runs on the CPU; and what a program without CUDA says. Options: those of e2e.py, and --emulated,
the binary with the emulated GPU."""

import argparse
import json
import pathlib
import re

import e2e

ARGUMENTS = argparse.Namespace(emulated=None)

# Small, because every GPU thread is emulated: four steps of 256 tokens.
CONFIG = """\
run { seed: 7 steps: 4 context_length: 128 global_batch_tokens: 256 precision: F32 }
model {
  vocab_size: 320 hidden_size: 32 num_layers: 2 num_heads: 4 num_kv_heads: 2 head_dim: 8
  ffn_hidden_size: 64
  mixer { name: "dense" softmax { causal {} } }
  mixer { name: "window" softmax { window { window: 70 sinks: 3 } } }
  layers: "dense window"
}
data { train { path: "corpus/train" } validation { path: "corpus/validation" } }
optimizer { adamw { lr: 1e-2 } clip_norm: 1.0 }
schedule { constant {} }
checkpoint { every_steps: 2 keep_last: 5 }
evaluation { every_steps: 2 rows: 2 }
"""
F32 = 1e-4  # relative, over all steps
BF16 = 1e-2
CUDA = "run.device=CUDA"


class CudaCase(e2e.TestCase):
    def setUp(self):
        super().setUp()
        self.config = self.write("config.textproto", CONFIG)

    def gpu(self, args, code=0, ranks=0):
        """Runs the program with the emulated GPU."""
        plain, e2e.OPTIONS.longspan = e2e.OPTIONS.longspan, ARGUMENTS.emulated
        try:
            result = self.start(args, ranks).wait()
        finally:
            e2e.OPTIONS.longspan = plain
        self.assertEqual(result.code, code, result.describe())
        return result

    def train_gpu(self, run, sets=(), extra=(), **kwargs):
        return self.gpu(self.train_arguments(self.folder / run, [CUDA, *sets], extra), **kwargs)

    def train_cpu(self, run, sets=(), extra=()):
        return self.run_ok(self.train_arguments(self.folder / run, sets, extra))

    def metrics(self, run):
        return e2e.Metrics(self.folder / run)

    def assert_close(self, run, other, tolerance):
        got, expected = self.metrics(run), self.metrics(other)
        self.assertLessEqual(e2e.relative_difference(got.losses(), expected.losses()), tolerance)
        self.assertEqual(set(got.evaluations), set(expected.evaluations))
        for key, value in expected.evaluations.items():
            self.assertLessEqual(abs(got.evaluations[key] / value - 1), tolerance, key)

    def assert_same_state(self, run, other, step):
        name = f"step_{step:08d}"
        for tensor in self.compare(self.folder / other / "checkpoints" / name,
                                   self.folder / run / "checkpoints" / name):
            self.assertEqual(tensor["max_difference"], 0, tensor)


class TrainTest(CudaCase):
    def test_f32_run_its_trace_and_its_checkpoints(self):
        self.train_cpu("cpu")
        done = self.train_gpu("gpu", extra=["--json", "--trace", "trace.json", "--trace-steps", "2"])
        self.assert_close("gpu", "cpu", F32)
        self.assertLess(self.metrics("gpu").losses()[-1], self.metrics("gpu").losses()[0] - 0.5)

        # Shares are of the device's time: nothing waits for other ranks, attention is a good part.
        summary = json.loads(done.out)
        self.assertTrue(0.02 < summary["attention_share"] < 1, summary)
        self.assertLess(summary["wait_share"], 0.02)

        # Memory by category: the four states of each parameter, on the device.
        memory = self.metrics("gpu").steps[-1]["peak_device_memory"]
        self.assertEqual(memory["gradients"], memory["parameters"])
        self.assertEqual(memory["optimizer"], 2 * memory["parameters"])
        self.assertGreater(memory["activations"], 0)
        self.assertGreater(memory["staging"], 0)
        self.assertEqual(memory["workspace"], 32 << 20)  # of cuBLASLt
        on_cpu = self.metrics("cpu").steps[-1]["peak_device_memory"]
        self.assertEqual(memory["parameters"], on_cpu["parameters"])

        events = json.loads((self.folder / "trace.json").read_text())["traceEvents"]
        tracks = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
        self.assertEqual(set(tracks), {"compute", "batches", "GPU"})
        spans = {track: [e["name"] for e in events if e["ph"] == "X" and e["tid"] == tid]
                 for track, tid in tracks.items()}
        # Two layers, forward and backward, two micro-batches, two steps.
        self.assertEqual(spans["GPU"].count("attention"), 16)
        self.assertEqual(spans["compute"].count("attention"), 16)
        self.assertGreaterEqual(spans["batches"].count("prepare batch"), 4)

        # A checkpoint does not know where it was made.
        self.train_cpu("cpu_on", extra=["--resume", "never"], sets=["run.steps=2"])
        for folder, starter, finish in (("there", "gpu", self.train_cpu),
                                        ("back", "cpu_on", self.train_gpu)):
            (self.folder / folder).mkdir()
            for name in ("metrics.jsonl",):
                lines = (self.folder / starter / name).read_text().splitlines(keepends=True)
                (self.folder / folder / name).write_text("".join(lines))
            source = self.folder / starter / "checkpoints" / "step_00000002"
            finish(folder, extra=["--resume", source])
            self.assert_close(folder, "cpu", F32)

        # The evaluation of a checkpoint, on either device.
        expected = self.metrics("gpu").evaluations[4, "validation_loss"]
        args = ["eval", self.folder / "gpu", "--rows", "2", "--json"]
        self.assertEqual(json.loads(self.gpu([*args, "--trace", "eval.json"]).out)[0]["value"], expected)
        self.assertIn('"GPU"', (self.folder / "eval.json").read_text())
        on_cpu = json.loads(self.run_ok([*args, "--set", "run.device=CPU"]).out)
        self.assertLessEqual(abs(on_cpu[0]["value"] / expected - 1), F32)

    def test_resume_is_bit_for_bit(self):
        sets = ["run.precision=BF16", "model.residual_dtype=F32", "run.recompute=LAYER"]
        self.train_gpu("whole", sets)
        self.train_gpu("parts", [*sets, "run.steps=2"])
        done = self.train_gpu("parts", sets)
        self.assertIn("resuming from", done.out)
        self.assertEqual(self.metrics("parts").curves(), self.metrics("whole").curves())
        self.assert_same_state("parts", "whole", 4)
        self.train_cpu("cpu", sets)
        self.assert_close("whole", "cpu", BF16)

    def test_sigmoid_attention(self):
        sigmoid = ["model.mixer[dense].sigmoid.causal={}",
                   "model.mixer[window].sigmoid.window={window: 70 sinks: 3}", "run.steps=2"]
        for precision, tolerance in (("F32", F32), ("BF16", BF16)):
            sets = [*sigmoid, f"run.precision={precision}"]
            self.train_gpu("gpu" + precision, sets)
            self.train_cpu("cpu" + precision, sets)
            self.assert_close("gpu" + precision, "cpu" + precision, tolerance)
        self.train_cpu("softmax", ["run.steps=2"])
        difference = e2e.relative_difference(self.metrics("softmax").losses(),
                                             self.metrics("gpuF32").losses())
        self.assertGreater(difference, 2 * F32)

    def test_skipped_and_failed_steps(self):
        """The host learns of a step only after the next one was issued."""
        sets = ["optimizer.adamw.lr=1000", "optimizer.adamw.weight_decay=1000",
                "optimizer.adamw.eps=1e-30", "evaluation.every_steps=0", "run.steps=30",
                "checkpoint.every_steps=1", "checkpoint.keep_last=1"]
        failed = self.train_gpu("stop", sets, code=2)
        step = int(re.search(r"step (\d+): the loss is", failed.err).group(1))
        self.assertEqual(len(self.metrics("stop").steps), step - 1)
        self.assertEqual([p.name for p in (self.folder / "stop" / "checkpoints").iterdir()],
                         [f"step_{step - 1:08d}"])


class RanksTest(CudaCase):
    def test_threads_on_one_gpu(self):
        """Ranks as threads on one GPU train as one rank does."""
        sets = ["run.context_length=512", "run.global_batch_tokens=512", "run.steps=2",
                "evaluation.every_steps=0", "checkpoint.every_steps=0"]
        self.train_gpu("one", sets)
        for strategy, zero in (("RING", 0), ("ALL_GATHER", 1), ("ULYSSES", 2), ("EXCHANGE", 3)):
            self.train_gpu(strategy, [*sets, "parallel.cp=4", f"parallel.strategy={strategy}",
                                      f"parallel.zero_stage={zero}"],
                           ["--local-ranks", "4"])
            self.assert_close(strategy, "one", F32)
            self.assertGreater(self.metrics(strategy).steps[0]["comm_bytes"], 0)
        refused = self.train_gpu("none", [*sets, "parallel.cp=2", "parallel.backend=MPI"],
                                 ["--local-ranks", "2"], code=2)
        self.assertIn("parallel.backend", refused.err)

    def test_processes_share_a_gpu_only_through_mpi(self):
        sets = ["parallel.cp=2", "run.context_length=256", "run.steps=2", "run.global_batch_tokens=256",
                "evaluation.every_steps=0", "checkpoint.every_steps=0"]
        refused = self.train_gpu("two", sets, ranks=2, code=2)
        self.assertRegex(refused.err, r"^longspan: error: ranks 0 and 1 would share GPU 0 \(.*\) of .*, "
                                      r"which has 1 .* parallel.backend: MPI\n$")
        self.assertFalse((self.folder / "two").exists())
        self.train_gpu("two", [*sets, "parallel.backend=MPI"], ranks=2)
        self.train_gpu("one", [s for s in sets if s != "parallel.cp=2"])
        self.assert_close("two", "one", F32)


class BenchTest(CudaCase):
    def records(self, op, *arguments):
        done = self.gpu(["bench", op, "--device", "cuda", "--seconds", "0", "--json", *arguments])
        machine, *records = [json.loads(line) for line in done.out.splitlines()]
        self.assertEqual((machine["op"], machine["device"]), ("machine", "cuda"))
        for record in records:
            self.assertEqual(record["device"], "cuda")
            for key in ("ms_median", "peak_gflops", "peak_gbps", "floor_ms"):
                self.assertGreater(record[key], 0, record)
        return records

    def test_ops(self):
        problems = e2e.SOURCE / "tests" / "bench" / "problems"
        memory = self.records("memory", "--problem", problems / "memory_smoke.txt")
        listed = [line for line in (problems / "memory_smoke.txt").read_text().split("\n")
                  if line and line[0] != "#"]
        self.assertEqual(list(dict.fromkeys(r["case"] for r in memory)), listed)
        self.assertTrue(all(r["impl"] == "cuda" and r["bytes"] > 0 for r in memory))
        gemm = self.records("gemm", "--problem", "gemm_bf16_dw_M33_N40_K72")
        self.assertEqual([(r["impl"], r["pass"]) for r in gemm], [("cublaslt", "backward")])
        attention = self.records("attention", "--problem", "window_f32_T130_Hq2_Hkv1_D16_W70")
        self.assertEqual([(r["impl"], r["pass"]) for r in attention],
                         [("reference_cuda", "forward"), ("reference_cuda", "backward")])
        # Each is checked against the CPU before it is timed.
        for dtype, impl in (("bf16", "mma_bf16"), ("f32", "reference_cuda")):
            sigmoid = self.records("attention", "--problem", f"sigmoid_causal_{dtype}_T130_Hq2_Hkv1_D16")
            self.assertEqual({r["impl"] for r in sigmoid}, {impl})

    def test_step(self):
        step, = self.records("step", "--problem", self.config, "--set", "run.context_length=64")
        self.assertEqual((step["op"], step["case"], step["impl"]), ("step", "config_T64", "f32"))
        self.assertAlmostEqual(step["tokens_per_s"] * step["ms_median"] / 64e3, 1)
        self.assertGreater(step["mfu"], 0)


class PlainTest(CudaCase):
    """The program without CUDA names the option and says what to do."""

    def test_errors(self):
        without = "CUDA cannot be used: this binary was built without CUDA; use CPU"
        cases = [(["train", self.config, "--set", CUDA], f"--set {CUDA}: run.device: {without}"),
                 (["bench", "gemm", "--device", "cuda"],
                  "--device cuda cannot be used: this binary was built without CUDA; use cpu")]
        for args, says in cases:
            result = self.start(args).wait()
            self.assertEqual(result.code, 2, result.describe())
            self.assertEqual(result.err, f"longspan: error: {says}\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--emulated", required=True, type=pathlib.Path)
    known, _ = parser.parse_known_args(namespace=argparse.Namespace())
    ARGUMENTS.emulated = known.emulated.resolve()
    e2e.main(parser)


if __name__ == "__main__":
    main()
