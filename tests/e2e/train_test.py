"""What a person relies on: plain runs without MPI, the same curve on two ranks, --init-from, eval,
inspect, --json, retention, and what may change when a run is resumed."""

import json
import math
import re
import shutil

import e2e

F32_LOSS = 1e-5  # relative, between layouts


class PlainRunTest(e2e.TestCase):
    # MPI_Init fails when it finds no daemon to start or is told to use an unknown component.
    NO_MPI = {"OMPI_MCA_pml": "no_such_component", "PATH": "/nonexistent"}

    def test_mpi_is_left_alone(self):
        args = self.train_arguments("run", ["run.steps=2", "parallel.cp=1"])
        result = self.run_ok(args, env=self.NO_MPI)
        self.assertIn("done at step 2", result.out)
        self.run_ok(["eval", "run", "--json"], env=self.NO_MPI)
        # The trap works: the same environment with a launcher's variables ends MPI_Init.
        launched = {**self.NO_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
        trapped = self.start(self.train_arguments("other", ["parallel.cp=1"]), env=launched).wait()
        self.assertNotEqual(trapped.code, 0, trapped.describe())
        self.assertRegex(trapped.err, "MPI|ORTE")

    def test_default_run_directory(self):
        self.run_ok(["train", self.config, "--set", "parallel.cp=1", "--set", "run.steps=1"])
        self.assertEqual(len(e2e.Metrics(self.folder / "runs" / "config").steps), 1)


class LayoutTest(e2e.TestCase):
    def test_one_and_two_ranks(self):
        self.train("one", 0)
        two = self.train("two", 2)
        one, got = (e2e.Metrics(self.folder / run) for run in ("one", "two"))
        self.assertEqual(len(one.steps), 6)
        self.assertLess(one.losses()[-1], one.losses()[0] - 0.5)
        self.assertLessEqual(e2e.relative_difference(got.losses(), one.losses()), F32_LOSS)
        self.assertEqual([s["comm_bytes"] for s in one.steps], [0] * 6)
        self.assertTrue(all(s["comm_bytes"] > 0 for s in got.steps))
        # mpirun gives its ranks a terminal of their own; ours is a file.
        self.assertNotIn("\x1b", two.out)
        lines = re.findall(r"^step (\d)/6  loss", two.out, re.MULTILINE)
        self.assertEqual(lines, list("123456"))

    def test_attention_implementations(self):
        """The one that is named runs: sums in another order, the same loss but for rounding."""
        losses = {}
        for name in ("", "portable", "reference"):
            sets = [f"run.attention_implementation={name}"] if name else []
            self.train(name or "best", 0, sets)
            losses[name] = e2e.Metrics(self.folder / (name or "best")).losses()
        for name in ("", "portable"):
            self.assertLessEqual(e2e.relative_difference(losses[name], losses["reference"]), F32_LOSS)
        self.assertNotEqual(losses["portable"], losses["reference"])

    def test_traffic_counts_steps_only(self):
        """Validation and saves send a lot, but not as part of a step."""
        self.train("run", sets=["data.document_mask=false", "evaluation.every_steps=2"])
        traffic = {s["comm_bytes"] for s in e2e.Metrics(self.folder / "run").steps}
        self.assertEqual(len(traffic), 1, traffic)
        self.assertGreater(min(traffic), 0)


class EndTest(e2e.TestCase):
    """Runs that end before their last step for reasons of their own."""

    def test_time_is_up(self):
        run = self.folder / "run"
        result = self.train(run, sets=["run.steps=1000000", "checkpoint.every_steps=0",
                                       "evaluation.every_steps=1000000"],
                            extra=["--max-minutes", "0.05"])
        self.assertIn("stopped and saved at step", result.out)
        self.assertGreater(result.seconds, 3)
        metrics = e2e.Metrics(run)
        last = len(metrics.steps)
        self.assertEqual(list(metrics.evaluations), [(last, "validation_loss")])
        self.assertEqual([p.name for p in e2e.checkpoints(run)], [f"step_{last:08d}"])

    def test_a_failing_step_leaves_the_save_before_it(self):
        """The loss is not finite while the checkpoint of the step before is still being written."""
        run = self.folder / "run"
        sets = ["run.steps=100", "optimizer.adamw.lr=1000", "optimizer.adamw.weight_decay=1",
                "checkpoint.every_steps=1", "checkpoint.keep_last=1", "evaluation.every_steps=0"]
        slow = ["--checkpoint-bytes-per-second", "400000"]
        result = self.start(self.train_arguments(run, sets, slow), 2).wait()
        self.assertEqual(result.code, 2, result.describe())
        failed = int(re.search(r"step (\d+): the loss is", result.err).group(1))
        self.assertGreater(failed, 1)
        self.assertEqual([p.name for p in (run / "checkpoints").iterdir()],
                         [f"step_{failed - 1:08d}"])
        self.run_ok(["inspect", run])

    def test_one_rank_fails_alone(self):
        """A token goes bad on disk during the run; only the replica whose row it is can notice."""
        damaged = self.folder / "damaged"
        damaged.mkdir()
        for suffix in ("idx", "bin", "json"):
            shutil.copy(self.shared / "corpus" / f"train.{suffix}", damaged / f"train.{suffix}")
        run = self.folder / "run"
        job = self.start(self.train_arguments(
            run, ["parallel.dp=2", "parallel.cp=1", "run.steps=1000000", "evaluation.every_steps=0",
                    "checkpoint.every_steps=0", f"data.train[0].path={damaged}/train"]), 2)
        e2e.wait_until(lambda: e2e.last_logged_step(run) >= 1, "the first step")
        with open(damaged / "train.bin", "r+b") as file:
            file.seek(2 * 5000)
            file.write(b"\xff\x7f")
        result = job.wait()
        self.assertEqual(result.code, 3, result.describe())
        self.assertRegex(result.err, r"longspan: error on rank [01]: .*32767")
        self.assertLess(result.seconds_after_error, e2e.GONE_WITHIN)


class CommandsTest(e2e.TestCase):
    """Commands on one finished run of two ranks."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        (cls.shared / "config.textproto").write_text(e2e.CONFIG)
        job = e2e.Job(cls.shared, ["train", "config.textproto", "--run-dir", "run", "--json"], 2)
        cls.trained = job.wait()
        assert cls.trained.code == 0, cls.trained.describe()

    def setUp(self):
        super().setUp()
        self.run_directory = self.folder / "run"
        shutil.copytree(self.shared / "run", self.run_directory)
        self.metrics = e2e.Metrics(self.run_directory)
        self.last = self.run_directory / "checkpoints" / "step_00000006"

    def json_of(self, args, ranks=0):
        return json.loads(self.run_ok([*args, "--json"], ranks).out)

    def test_train_json(self):
        summary = json.loads(self.trained.out)
        self.assertEqual(summary["step"], 6)
        self.assertFalse(summary["stopped"])
        self.assertEqual(summary["loss"], self.metrics.losses()[-1])
        self.assertEqual(summary["validation_loss"], self.metrics.evaluations[6, "validation_loss"])
        self.assertEqual(self.trained.err, "")

    def test_eval_is_the_validation_of_training(self):
        expected = self.metrics.evaluations[6, "validation_loss"]
        args = ["eval", self.run_directory, "--tasks", "loss", "--rows", "5"]
        two = self.json_of(args, ranks=2)
        self.assertEqual([(e["task"], e["length"], e["step"], e["rows"]) for e in two],
                         [("loss", 512, 6, 5)])
        self.assertEqual(two[0]["value"], expected)
        one = self.json_of(args)
        self.assertLessEqual(abs(one[0]["value"] / expected - 1), F32_LOSS)
        self.assertEqual(one[0]["valid_tokens"], two[0]["valid_tokens"])
        # An earlier checkpoint is another model; the training set is another text.
        earlier = self.json_of(["eval", self.last.with_name("step_00000004"), "--rows", "5"])
        self.assertEqual(earlier[0]["step"], 4)
        self.assertGreater(earlier[0]["value"], expected + 0.01)
        other = self.json_of([*args, "--data", "corpus/train"])
        self.assertNotEqual(other[0]["value"], one[0]["value"])

    def test_eval_at_several_lengths(self):
        results = self.json_of(["eval", self.last, "--lengths", "256,512", "--rows", "5"], ranks=2)
        self.assertEqual([r["length"] for r in results], [256, 512])
        self.assertLess(results[0]["valid_tokens"], results[1]["valid_tokens"])

    def test_eval_on_fewer_ranks(self):
        """Groups that the training's ranks formed are no reason to refuse another number of ranks."""
        for run, groups in (("hybrid", ["parallel.strategy=HYBRID", "parallel.ulysses_ranks=2",
                                        "parallel.zero_stage=3", "parallel.hybrid_shard=2"]),
                            ("nodes", ["parallel.strategy=DOUBLE_RING", "parallel.ranks_per_node=2"])):
            self.train(run, sets=["run.steps=1", "evaluation.every_steps=1", *groups])
            (one,) = self.json_of(["eval", run, "--rows", "5"])
            trained = e2e.Metrics(self.folder / run).evaluations[1, "validation_loss"]
            self.assertLessEqual(abs(one["value"] / trained - 1), F32_LOSS)

    def test_inspect(self):
        report = self.json_of(["inspect", self.last])
        self.assertEqual((report["kind"], report["step"], report["dp"], report["cp"]),
                         ("checkpoint", 6, 1, 2))
        size = sum(path.stat().st_size for path in self.last.iterdir())
        self.assertEqual(report["verified_bytes"], size)
        self.assertEqual(self.json_of(["inspect", self.run_directory])["path"], str(self.last))
        names = [t["name"] for t in report["tensors"]]
        self.assertIn("weights/model.embed_tokens.weight", names)
        self.assertEqual(self.json_of(["inspect", self.config])["kind"], "config")
        dataset = self.json_of(["inspect", "corpus/train"])
        self.assertEqual(dataset["kind"], "dataset")
        prepared = {d["prefix"]: d for d in self.prepared["datasets"]}["corpus/train"]
        self.assertEqual(dataset["tokens"], prepared["tokens"])
        self.assertIsNone(self.json_of(["inspect", self.last, "--no-verify"])["verified_bytes"])

    def test_bigram(self):
        bigram = self.json_of(["bigram", "corpus/train", "corpus/validation"])
        self.assertTrue(1 < bigram["loss"] < 4, bigram)

    def test_init_from(self):
        """A new run that starts from the weights of another, and only from them."""
        frozen = ["optimizer.adamw.lr=1e-30", "run.steps=1", "run.seed=8",
                  "evaluation.every_steps=1"]
        result = self.train("next", sets=frozen, extra=["--init-from", self.run_directory])
        self.assertIn(f"weights from {self.last}", result.out)
        following = self.folder / "next"
        metrics = e2e.Metrics(following)
        self.assertEqual([s["step"] for s in metrics.steps], [1])
        self.assertEqual(metrics.evaluations[1, "validation_loss"],
                         self.metrics.evaluations[6, "validation_loss"])
        first = following / "checkpoints" / "step_00000001"
        for tensor in self.compare(self.last, first, "weights/"):
            self.assertEqual(tensor["max_difference"], 0, tensor)
        moments = self.compare(self.last, first, "adamw.m/")
        self.assertTrue(all(m["max_difference"] > 0 for m in moments))
        # Without it the run starts anew.
        self.train("fresh", sets=frozen)
        self.assertGreater(e2e.Metrics(self.folder / "fresh").evaluations[1, "validation_loss"],
                           metrics.evaluations[1, "validation_loss"] + 0.5)


    def test_gates(self):
        """Gates of a finished model: trained alone, read by inspect, left out by the next run."""
        gated = ["model.mixer[s2].softmax.duo.sinks=16", "model.mixer[s2].softmax.duo.recent=64",
                 "objective.duo_gates.regularization=100", "optimizer.adamw.lr=0.4", "run.steps=3",
                 "run.recompute=ATTENTION_KEPT"]
        alone = self.start(self.train_arguments("none", ["parallel.cp=1", *gated])).wait()
        self.assertEqual(alone.code, 2, alone.describe())
        self.assertIn("give that model with --init-from", alone.err)
        result = self.train("gates", sets=gated, ranks=2,
                            extra=["--init-from", self.run_directory])
        self.assertIn("it lacks 1 tensors of gates", result.out)
        self.assertIn("duo_gates loss", result.out)
        steps = e2e.Metrics(self.folder / "gates").steps
        self.assertEqual([step["objective"] for step in steps], ["duo_gates"] * 3)
        self.assertAlmostEqual(steps[0]["loss"], 100, places=6)
        self.assertEqual(steps[0]["mean_gate"], 1)
        self.assertLess(steps[2]["mean_gate"], 1)
        saved = self.folder / "gates" / "checkpoints" / "step_00000003"
        for tensor in self.compare(self.last, saved, "weights/model.layers.0"):
            self.assertEqual(tensor["max_difference"], 0, tensor)
        report = self.json_of(["inspect", saved])
        (layer,) = report["gates"]["layers"]
        self.assertEqual((layer["layer"], layer["streaming"]), (1, [0, 1]))
        self.assertTrue(all(0 <= alpha < 0.5 for alpha in layer["alpha"]), layer)
        # What inspect prints is a configuration that lets these heads stream.
        lines = [line for line in e2e.CONFIG.splitlines()
                 if '"s2"' not in line and not line.strip().startswith("layers:")]
        lines.insert(lines.index("model {") + 1, report["gates"]["config"])
        spans = self.write("spans.textproto", "\n".join(lines))
        result = self.run_ok([*self.train_arguments("spans", ["run.steps=1"], config=spans),
                              "--init-from", "gates"], 2)
        self.assertIn("its 1 tensors of gates have no place here", result.out)
        self.assertIn("spans", self.run_ok(["inspect", spans]).out)

    def test_gates_that_choose_blocks(self):
        """Taught by a finished model, then used; untaught ones are refused."""
        seer = ["model.mixer[s2].softmax.seer.top_k=3", "model.mixer[s2].softmax.seer.gate_dim=8",
                "run.steps=2"]
        alone = self.start(self.train_arguments("none", ["parallel.cp=1", *seer])).wait()
        self.assertEqual(alone.code, 2, alone.describe())
        self.assertIn("objective.seer_gates has taught", alone.err)
        dense = self.start(self.train_arguments("none", ["parallel.cp=1", *seer],
                                                ["--init-from", self.run_directory])).wait()
        self.assertEqual(dense.code, 2, dense.describe())
        self.assertIn("first teach the gates", dense.err)

        self.train("taught", ranks=0, sets=[*seer, "objective.seer_gates={}"],
                   extra=["--init-from", self.run_directory])
        steps = e2e.Metrics(self.folder / "taught").steps
        self.assertEqual([step["objective"] for step in steps], ["seer_gates"] * 2)
        # Four rows of eight blocks, of which the first two do not count.
        self.assertEqual([step["valid_tokens"] for step in steps], [4 * 6] * 2)
        saved = self.folder / "taught" / "checkpoints" / "step_00000002"
        for tensor in self.compare(self.last, saved, "weights/model.layers.0"):
            self.assertEqual(tensor["max_difference"], 0, tensor)
        self.train("used", ranks=0, sets=seer, extra=["--init-from", "taught"])
        (used,) = self.json_of(["eval", "used", "--rows", "5"])
        self.assertEqual(used["value"], e2e.Metrics(self.folder / "used")
                         .evaluations[2, "validation_loss"])


class SigmoidTest(e2e.TestCase):
    """A model with a sigmoid layer; its bias is -log of the 512 tokens that it is trained with."""

    BIAS = "model.mixer[dense].sigmoid.bias"
    SIGMOID = ["model.mixer[dense].sigmoid.causal={}"]

    def loss_of(self, run, *args):
        (result,) = json.loads(self.run_ok(["eval", run, "--rows", "5", "--json", *args]).out)
        return result["value"]

    def test_a_run(self):
        self.train("one", 0, self.SIGMOID)
        self.train("two", 2, self.SIGMOID)
        self.train("softmax", 0)
        one, two, softmax = (e2e.Metrics(self.folder / run) for run in ("one", "two", "softmax"))
        self.assertLess(one.losses()[-1], one.losses()[0] - 0.5)
        self.assertLessEqual(e2e.relative_difference(two.losses(), one.losses()), F32_LOSS)
        self.assertGreater(e2e.relative_difference(softmax.losses(), one.losses()), 100 * F32_LOSS)

        # The bias is saved with the model and stays as it is in shorter rows.
        report = json.loads(self.run_ok(["inspect", "one", "--json"]).out)
        dense = report["config"]["mixers"][0]
        self.assertEqual((dense["normalization"], dense["bias"]), ("sigmoid", -math.log(512)))
        self.assertEqual(self.loss_of("one"), one.evaluations[6, "validation_loss"])
        short = ["--lengths", "256"]
        same, other = (["--set", f"{self.BIAS}={-math.log(n)!r}"] for n in (512, 256))
        loss = self.loss_of("one", *short)
        self.assertEqual(self.loss_of("one", *short, *same), loss)
        self.assertNotEqual(self.loss_of("one", *short, *other), loss)

        # A longer row would derive another bias for the same weights, which is said.
        longer = [*self.SIGMOID, "run.context_length=1024", "run.steps=1"]
        says = "its layers have other patterns, normalization or bias"
        start = ["--init-from", self.folder / "one"]
        self.assertIn(says, self.train("other", 0, longer, start).out)
        self.assertNotIn(says, self.train("same", 0, [*longer, f"{self.BIAS}={-math.log(512)!r}"],
                                          start).out)

    def test_resuming_with_another_model(self):
        self.train("run", 0, [*self.SIGMOID, "run.steps=2"])
        saved = f"model.layers is sigmoid bias {-math.log(512)!r} causal, "
        for sets, now in ((["run.steps=4"], "and causal, "),
                          ([*self.SIGMOID, "run.steps=4", f"{self.BIAS}=-6.2383246250395"],
                           "and sigmoid bias -6.2383246250395 causal, ")):
            args = self.train_arguments("run", ["parallel.cp=1", *sets])
            result = self.start(args).wait()
            self.assertEqual(result.code, 2, result.describe())
            self.assertIn(saved, result.err)
            self.assertIn(now, result.err)


class ResumeTest(e2e.TestCase):
    def refused(self, run, sets, says, extra=()):
        before = e2e.digest(run)
        result = self.start(self.train_arguments(run, sets, extra), 2).wait()
        self.assertEqual(result.code, 2, result.describe())
        self.assertEqual(len(result.err.splitlines()), 1, result.describe())
        for part in says:
            self.assertIn(part, result.err)
        self.assertEqual(e2e.digest(run), before)

    def test_what_may_change(self):
        run = self.folder / "run"
        self.train(run, sets=["run.steps=4"])
        more = "run.steps=6"
        self.refused(run, [more, "run.seed=8"], ["run.seed is 7 in the checkpoint and 8 now"])
        self.refused(run, [more, "model.ffn_hidden_size=96", "run.global_batch_tokens=4096"],
                     ["model.ffn_hidden_size is 64 in the checkpoint and 96 now",
                      "run.global_batch_tokens is 2048 in the checkpoint and 4096 now"])
        self.refused(run, [more, "model.mixer[s2].softmax.s2.local_blocks=2"], ["model.layers is"])
        self.refused(run, [more, "data.train[0].path=corpus/validation"], ["data.train is"])
        self.refused(run, [more, "data.packing=BALANCED"],
                     ["data.packing is not set in the checkpoint and is BALANCED now"])
        self.refused(run, [more], ["--resume never", "step_00000004", "--resume auto"],
                     extra=["--resume", "never"])
        self.refused(run, [more], ["--init-from", "--resume"],
                     extra=["--resume", "4", "--init-from", run])

        # Steps, layout, cadence, evaluation and logging may.
        result = self.train(run, 0, [more, "parallel.placement=CONTIGUOUS", "evaluation.rows=2",
                                     "evaluation.every_steps=1", "checkpoint.every_steps=1",
                                     "run.log_every_steps=2", "run.recompute=LAYER",
                                     "run.mlp_tile_tokens=100"])
        self.assertIn(f"resuming from {run}/checkpoints/step_00000004", result.out)
        self.train("whole", sets=[more])
        got, whole = e2e.Metrics(run), e2e.Metrics(self.folder / "whole")
        self.assertEqual(got.losses()[:4], whole.losses()[:4])
        self.assertLessEqual(e2e.relative_difference(got.losses(), whole.losses()), F32_LOSS)

        # A run that has all its steps stays as it is.
        before = (run / "metrics.jsonl").read_bytes()
        self.assertIn("done: all 6 steps were done before", self.train(run, sets=[more]).out)
        summary = json.loads(self.train(run, sets=[more], extra=["--json"]).out)
        self.assertEqual([summary[k] for k in ("step", "loss", "tokens_per_s")], [6, None, None])
        self.assertEqual((run / "metrics.jsonl").read_bytes(), before)

    def test_an_older_step(self):
        run = self.folder / "run"
        self.train(run)
        before = e2e.Metrics(run).curves()
        result = self.train(run, extra=["--resume", "2"])
        self.assertIn("step_00000004.superseded", result.out)
        self.assertEqual(e2e.Metrics(run).curves(), before)
        self.assertEqual([p.name for p in e2e.checkpoints(run)],
                         ["step_00000002", "step_00000004", "step_00000006"])

    def test_retention(self):
        self.train("run", sets=["run.steps=14", "checkpoint.keep_last=2", "checkpoint.keep_every=6",
                                "evaluation.every_steps=0"])
        run = self.folder / "run"
        self.assertEqual(sorted(p.name for p in (run / "checkpoints").iterdir()),
                         ["step_00000006", "step_00000012", "step_00000014"])
        self.assertEqual((run / "config.textproto").read_text().count("keep_every: 6"), 1)


if __name__ == "__main__":
    e2e.main()
