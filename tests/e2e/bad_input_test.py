"""Bad input: one sentence on stderr that names what is wrong and the remedy, exit code 2, from rank
0 only, all processes gone soon, nothing overwritten. Cases run under mpirun; those where ranks do
not matter run plainly as well.

FullDiskTest mounts small file systems, so it runs in a mount namespace of its own (CMakeLists.txt).
"""

import os
import platform
import shutil
import signal
import subprocess
import time

import e2e

kHeaderBytes = 34  # of an .idx file


class RefusalCase(e2e.TestCase):
    def refused(self, args, says, ranks=(2,), untouched=None):
        """Runs `longspan args` with each number of ranks (0: plainly). `says` are parts of the
        sentence; `untouched` is a folder that must stay as it is."""
        for n in ranks:
            with self.subTest(ranks=n, args=" ".join(map(str, args))):
                before = e2e.digest(untouched) if untouched else None
                self.check_refusal(self.start(args, n).wait(limit=120), says)
                if untouched:
                    self.assertEqual(e2e.digest(untouched), before, "files changed")

    def check_refusal(self, result, says):
        self.assertEqual(result.code, 2, result.describe())
        lines = result.err.splitlines()
        self.assertEqual(len(lines), 1, result.describe())
        self.assertTrue(lines[0].startswith("longspan: error: "), result.describe())
        for part in says:
            self.assertIn(str(part), lines[0])
        self.assertNotIn("error", result.out)
        self.assertLess(result.seconds_after_error, e2e.GONE_WITHIN)

    def train_refused(self, sets, says, ranks=(2,), run=None, extra=(), config=None):
        """Without `run` the run directory is a new one, which may be made but holds no files."""
        untouched = run
        run = run or self.folder / "new_run"
        self.refused(self.train_arguments(run, sets, extra, config), says, ranks, untouched)
        if untouched is None:
            files = [name for name, what in e2e.digest(run).items() if what != "directory"]
            self.assertEqual(files, [])


class ConfigurationTest(RefusalCase):
    def test_unknown_field(self):
        config = self.write("bad.textproto", e2e.CONFIG.replace("clip_norm", "clip_norms"))
        line = e2e.CONFIG[: e2e.CONFIG.index("clip_norm")].count("\n") + 1
        self.train_refused((), [f"bad.textproto:{line}: optimizer.clip_norms: unknown field",
                                "did you mean clip_norm?"], (0, 2), config=config)
        self.train_refused(["run.stepz=4"], ["--set run.stepz=4", "unknown field", "steps"])

    def test_wrong_type(self):
        config = self.write("bad.textproto", e2e.CONFIG.replace("steps: 6", 'steps: "six"', 1))
        self.train_refused((), ["bad.textproto:3:", "run.steps", '"six" is not a whole number'],
                           (0, 2), config=config)
        self.train_refused(["parallel.placement=SPIRAL"],
                           ["parallel.placement", "SPIRAL", "ZIGZAG", "CONTIGUOUS"])

    def test_missing_files(self):
        self.train_refused((), ["nowhere.textproto", "No such file", ".textproto"], (0, 2),
                           config="nowhere.textproto")
        self.train_refused(["data.train[0].path=corpus/nowhere"],
                           ["corpus/nowhere.idx does not exist", "longspan prepare"])
        self.train_refused(["data.validation[0].path=corpus/nowhere"],
                           ["corpus/nowhere.idx does not exist", "longspan prepare"])
        for option in ("--init-from", "--resume"):
            self.train_refused((), ["there is no checkpoint at nowhere", "give "],
                               extra=[option, "nowhere"])
        self.refused(["eval", "nowhere"], ["there is no checkpoint at nowhere"], (0, 2))
        self.refused(["inspect", "nowhere"], ["nowhere"], (0, 2))

    def test_ranks_unlike_layout(self):
        says = ["parallel.dp = 1 times parallel.cp = 2 is 2", "launch/mpirun.sh -n 2"]
        self.train_refused((), [*says, "the job has 1 rank;"], (0, 1))
        self.train_refused((), [*says, "the job has 3 ranks;"], (3,))

    def test_context_without_whole_blocks(self):
        sets = ["run.context_length=448", "run.global_batch_tokens=1792"]
        self.train_refused(sets, ["run.context_length: 448 does not split", "ZIGZAG",
                                  "multiple of 256"])
        # The same length is fine where blocks need not be cut in two halves per rank.
        self.train_refused([*sets, "parallel.placement=CONTIGUOUS"],
                           ["run.context_length: 448 does not split", "CONTIGUOUS",
                            "multiple of 128"])

    def test_heads(self):
        self.train_refused(["model.num_kv_heads=3"],
                           ["model.num_kv_heads: 3 does not divide num_heads 4", "1, 2, 4"], (0, 2))

    def test_incomplete_s2_coverage(self):
        self.train_refused(["model.mixer[s2].softmax.s2.stride_blocks=4"],
                           ["model.mixer[s2].softmax.s2.stride_blocks", "only 2 of every 4",
                            "allow_incomplete_coverage"], (0, 2))

    def test_full_attention_sees_the_labels(self):
        self.train_refused(["model.mixer[dense].softmax.full={}"],
                           ["model.mixer[dense].softmax.full", "use causal"], (2,))
        self.train_refused(["model.mixer[dense].sigmoid.full={}"],
                           ["model.mixer[dense].sigmoid.full", "use causal"], (2,))

    def test_gates_under_sigmoid(self):
        self.train_refused(["model.mixer[dense].sigmoid.duo={}"],
                           ["model.mixer[dense].sigmoid.duo", "softmax only"], (0, 2))

    def test_attention_implementation(self):
        field = "run.attention_implementation"
        for name, why in (("fast", '"fast" does not exist'), ("mma_bf16", "does not exist on this device"),
                          ("amx_bf16", "cannot run mixer dense here: it takes bf16")):
            self.train_refused([f"{field}={name}"], [field, why], (2,))

    def test_vocabulary_too_small(self):
        self.train_refused(["model.vocab_size=200"],
                           ["model.vocab_size = 200", "token id 256", "corpus/train",
                            "at least 257"], (2,))


class DatasetTest(RefusalCase):
    def damaged(self, change, says):
        """Lets `change(idx, bin)` damage a copy of the training set."""
        copy = self.folder / f"copy{time.monotonic_ns()}"
        copy.mkdir()
        for suffix in ("idx", "bin", "json"):
            shutil.copy(self.shared / "corpus" / f"train.{suffix}", copy / f"train.{suffix}")
        change(copy / "train.idx", copy / "train.bin")
        self.train_refused([f"data.train[0].path={copy}/train"], [str(copy), *says],
                           run=None)
        return copy

    def test_truncated_and_foreign_files(self):
        size = (self.shared / "corpus" / "train.bin").stat().st_size
        self.damaged(lambda idx, _: os.truncate(idx, 20), ["train.idx is truncated", "prepare"])
        self.damaged(lambda idx, _: os.truncate(idx, idx.stat().st_size - 8),
                     ["train.idx is truncated", "prepare"])
        self.damaged(lambda _, bin_: os.truncate(bin_, size - 2),
                     ["train.bin is truncated", f"{size - 2} bytes", f"{size}", "prepare"])
        self.damaged(lambda _, bin_: bin_.write_bytes(b"\x89PNG" * size),
                     ["train.bin is too long", "prepare"])
        self.damaged(lambda idx, _: idx.write_bytes(b"%PDF-1.7 " * 400),
                     ["train.idx is not a Megatron index", "prepare"])
        self.damaged(lambda idx, _: idx.write_bytes(idx.read_bytes()[:kHeaderBytes - 17] +
                                                    b"\7" + idx.read_bytes()[18:]),
                     ["train.idx has dtype code 7", "floating point"])


class CheckpointTest(RefusalCase):
    """Damage to the checkpoints of a finished run."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        (cls.shared / "config.textproto").write_text(e2e.CONFIG)
        args = ["train", "config.textproto", "--run-dir", "run"]
        result = e2e.Job(cls.shared, args, ranks=2).wait()
        assert result.code == 0, result.describe()

    def setUp(self):
        super().setUp()
        self.run_directory = self.folder / "run"
        shutil.copytree(self.shared / "run", self.run_directory)
        self.newest = self.run_directory / "checkpoints" / "step_00000006"
        self.sets = ["run.steps=8"]

    def flip(self, path, at):
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    def everywhere_refused(self, says):
        """Resuming, --init-from, eval and inspect all find the damage."""
        self.train_refused(self.sets, says, run=self.run_directory, extra=["--resume", self.newest])
        self.train_refused(self.sets, says, extra=["--init-from", self.newest])
        self.refused(["eval", self.newest], says, untouched=self.run_directory)
        self.refused(["inspect", self.newest], says, (0,), untouched=self.run_directory)

    def test_flipped_bit_in_weights(self):
        shard = self.newest / "shard_00001.binpb"
        self.flip(shard, 400)  # among the first weights that rank 1 wrote
        says = ["shard_00001.binpb is damaged", "checksum", "use another checkpoint"]
        self.everywhere_refused(says)
        self.train_refused(self.sets, says, run=self.run_directory)  # --resume auto
        # The advice works.
        self.run_ok(self.train_arguments(self.run_directory, self.sets, ["--resume", "4"]), 2)
        self.assertEqual(len(e2e.Metrics(self.run_directory).steps), 8)

    def test_flipped_bit_in_manifest(self):
        self.flip(self.newest / "manifest.binpb", 200)
        self.everywhere_refused(["manifest.binpb cannot be used", "checksum",
                                 "use another checkpoint"])

    def test_missing_shard(self):
        (self.newest / "shard_00001.binpb").unlink()
        self.everywhere_refused(["shard_00001.binpb cannot be read", "use another checkpoint"])

    def test_truncated_shard(self):
        shard = self.newest / "shard_00000.binpb"
        os.truncate(shard, shard.stat().st_size - 1)
        self.everywhere_refused(["shard_00000.binpb has", "bytes where the manifest says",
                                 "use another checkpoint"])

    def test_every_checkpoint_is_unusable(self):
        for path in e2e.checkpoints(self.run_directory):
            (path / "shard_00000.binpb").unlink()
        self.train_refused(self.sets, ["none of the 3 checkpoints", "shard_00000.binpb", "move"],
                           run=self.run_directory)

    def test_another_model(self):
        wider = [*self.sets, "model.hidden_size=64"]
        self.train_refused(wider, ["model.hidden_size is 32 in the checkpoint and 64 now",
                                   "--init-from"], run=self.run_directory)
        self.train_refused(wider, ["is of another model", "f32[320, 32] in the checkpoint",
                                   "f32[320, 64] in the model", "more tensors",
                                   "change the model section"],
                           extra=["--init-from", self.newest])
        self.train_refused([*self.sets, "model.num_layers=3"],
                           ["is of another model", "model.layers.2."],
                           extra=["--init-from", self.newest])

    def test_step_that_does_not_exist(self):
        says = ["there is no checkpoint at", "step_00000005", "these exist", "step_00000006",
                "step_00000004", "step_00000002"]
        self.train_refused(self.sets, says, run=self.run_directory, extra=["--resume", "5"])

    def test_corpus_of_the_same_size(self):
        """A foreign .bin that fits the index is noticed when the run is resumed."""
        copy = self.folder / "copy"
        shutil.copytree(self.shared / "corpus", copy)
        self.flip(copy / "train.bin", 1000)
        self.train_refused([*self.sets, f"data.train[0].path={copy}/train"],
                           ["data.train is", "in the checkpoint"], run=self.run_directory)


class RunDirectoryTest(RefusalCase):
    def test_below_a_file(self):
        self.write("file", "text")
        for run in ("file/run", "file"):
            self.refused(self.train_arguments(run), [run, "choose another"],
                         untouched=self.folder / "corpus")
            self.assertEqual((self.folder / "file").read_text(), "text")

    def test_metrics_that_are_not_ours(self):
        self.train("run", sets=["run.steps=2"])
        run = self.folder / "run"
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text("not json\n" + text)
        self.train_refused(["run.steps=4"], ["metrics.jsonl:1", "repair"], run=run)

    def test_locked(self):
        run = self.folder / "run"
        first = self.start(self.train_arguments(run, ["run.steps=1000000", "parallel.cp=1",
                                                      "checkpoint.every_steps=0",
                                                      "evaluation.every_steps=0"]))
        e2e.wait_until(lambda: e2e.last_logged_step(run) >= 1, "the first job's first step")
        holder = first.processes()[0].pid
        os.kill(holder, signal.SIGSTOP)  # its files stay as they are, its lock too
        self.train_refused((), [f"{run} is in use by process {holder} on host {platform.node()}",
                                "waited 1.5 s", "stop that job or choose another"],
                           run=run, extra=["--lock-wait", "1.5"])

        # A stop signal ends the wait.
        waiting = self.start(self.train_arguments(run, (), ["--lock-wait", "600"]), 2)
        e2e.wait_until(lambda: any(p.rank == 0 for p in waiting.processes()), "the waiting job")
        time.sleep(3)
        waiting.process.send_signal(signal.SIGTERM)
        result = waiting.wait(limit=60)
        self.assertNotEqual(result.code, 0, result.describe())
        self.assertIn("stopped while another job held", result.err)

        # A job that is patient enough goes on where the first one stopped.
        os.kill(holder, signal.SIGCONT)
        second = self.start(self.train_arguments(run, ["run.steps=3"],
                                                 ["--lock-wait", "60", "--resume", "never"]), 2)
        e2e.wait_until(lambda: any(p.rank == 0 for p in second.processes()), "the second job")
        time.sleep(1)
        self.assertTrue(second.running())
        os.kill(holder, signal.SIGKILL)
        self.assertEqual(second.wait().code, 0)
        self.assertEqual(len(e2e.Metrics(run).steps), 3)


class FullDiskTest(RefusalCase):
    def mount(self, size):
        path = self.folder / "disk"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", path], check=False)
        return path

    def remount(self, path, option):
        subprocess.run(["mount", "-o", f"remount,{option}", path], check=True)

    def test_full_disk_during_a_save(self):
        disk = self.mount("800k")  # one checkpoint has about 460 kB
        run = disk / "run"
        args = self.train_arguments(run, ["run.steps=12", "evaluation.every_steps=0"])
        result = self.start(args, 2).wait()
        self.check_refusal(result, ["saving checkpoint step_00000004 failed",
                                    "No space left on device", "newest complete checkpoint",
                                    "step_00000002"])
        self.assertEqual([p.name for p in e2e.checkpoints(run)], ["step_00000002"])
        self.assertEqual(list((run / "checkpoints").glob("*.tmp")), [])
        self.run_ok(["inspect", run / "checkpoints" / "step_00000002"])
        self.assertLess(e2e.last_logged_step(run), 8, "the run went on after the failed save")

        self.remount(disk, "size=10m")
        resumed = self.run_ok(args, 2)
        self.assertIn("resuming from", resumed.out)
        self.train("whole", sets=["run.steps=12", "evaluation.every_steps=0"])
        self.assertEqual(e2e.Metrics(run).curves(), e2e.Metrics(self.folder / "whole").curves())

    def test_read_only_file_system(self):
        disk = self.mount("10m")
        self.train(disk / "run", sets=["run.steps=2"])
        self.remount(disk, "ro")
        for run in (disk / "run", disk / "other"):
            self.refused(self.train_arguments(run, ["run.steps=4"]),
                         [run, "Read-only file system", "choose another"], untouched=disk)


class BannerTest(RefusalCase):
    def test_without_quiet(self):
        """mpirun's own banner aside, rank 0's sentence is all there is."""
        result = self.start(self.train_arguments("run", ["model.num_kv_heads=3"]), 2,
                            quiet=False).wait()
        self.assertEqual(result.code, 2, result.describe())
        self.assertEqual(result.err.count("longspan: error"), 1, result.describe())
        self.assertIn("\nlongspan: error: ", "\n" + result.err)


if __name__ == "__main__":
    e2e.main()
