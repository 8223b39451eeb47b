"""A job that is killed or stopped at any moment continues as if nothing had happened.

  --kills K --in-save S  for each precision: K kills, S of them while a checkpoint is being written
  --step-seconds T       length of the steps that signals interrupt
"""

import argparse
import os
import random
import re
import signal
import time

import e2e

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--kills", type=int, default=2)
PARSER.add_argument("--in-save", type=int, default=1)
# Long enough for a signal to pass mpirun within a step on a busy machine.
PARSER.add_argument("--step-seconds", type=float, default=1.5)
ARGUMENTS = argparse.Namespace()

STEPS = 24
EVERY = 3  # steps between checkpoints
# Makes a save of about 460 kB by two ranks last a second, so that a kill can aim at it.
SLOW_WRITER = ["--checkpoint-bytes-per-second", "230000"]


class KillTest(e2e.TestCase):
    def committed(self, run):
        """Every directory with a checkpoint's name must be a whole checkpoint: checks each byte."""
        found = e2e.checkpoints(run)
        for path in found:
            self.run_ok(["inspect", path, "--json"])
        return found

    def launch(self, run, slow):
        """Continues the run and checks from where it does."""
        found = self.committed(run)
        job = self.start(self.train_arguments(
            run, self.sets, [*(SLOW_WRITER if slow else []), "--resume", "auto"]), 2)
        return job, found[-1] if found else None

    def check_start(self, job, expected):
        """The job has resumed from `expected`, the newest committed checkpoint (None: the start)."""
        chosen = re.findall(r"^resuming from (\S+)", job.out_path.read_text(), re.MULTILINE)
        self.assertEqual(chosen, [str(expected)] if expected else [])
        self.resumed += len(chosen)

    def victim(self, job):
        """A random rank or mpirun; nothing when the job has ended."""
        while job.running():
            targets = [p for p in job.processes() if p.kind != "other"]
            if targets:
                return self.rng.choice(sorted(targets, key=lambda p: (p.kind, p.rank)))
        return None

    def kill(self, job, what):
        victim = self.victim(job)
        if victim is None:
            return False
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        start = time.monotonic()
        result = job.wait(limit=60)
        self.assertLess(time.monotonic() - start, e2e.GONE_WITHIN)
        if result.code == 0:  # it was at its end already
            return False
        print(f"  killed {victim.kind} {victim.rank if victim.rank >= 0 else ''} {what}", flush=True)
        return True

    def partial_saves(self, run):
        folder = run / "checkpoints"
        return list(folder.glob("*.tmp")) if folder.is_dir() else []

    def kill_in_save(self, run):
        """Kills inside a save; returns whether it did (the save may end just before)."""
        job, expected = self.launch(run, slow=True)
        fresh = lambda: [p for p in self.partial_saves(run) if any(p.iterdir())]
        # A first save that is broken off leaves nothing to resume from; go for a later one.
        commits = self.rng.randint(0 if expected else 1, 2)
        newest = (int(expected.name[5:]) if expected else 0) + EVERY * commits
        # What an earlier job left is removed when this one starts.
        e2e.wait_until(lambda: not job.running() or
                       ("\nstep " in job.out_path.read_text() and fresh() and
                        (newest == 0 or (run / "checkpoints" / f"step_{newest:08d}").exists())),
                       f"a save after step {newest}")
        time.sleep(self.rng.uniform(0, 0.9))
        killed = self.kill(job, f"in a save, {len(fresh())} partial checkpoint on disk")
        if killed:
            self.check_start(job, expected)
        return killed and len(fresh()) == 1

    def kill_anywhere(self, run):
        """Kills at a random moment: while the job starts, in a step, between steps."""
        job, expected = self.launch(run, slow=False)
        steps = self.rng.randint(0, 2 * EVERY)
        delay = self.rng.uniform(0, 1.5) if steps == 0 else self.rng.uniform(0, 0.1)
        first = int(expected.name[5:]) if expected else 0
        if steps > 0:
            e2e.wait_until(lambda: not job.running() or
                           ("\nstep " in job.out_path.read_text() and
                            e2e.last_logged_step(run) >= first + steps), "steps")
        time.sleep(delay)
        killed = self.kill(job, f"after {steps} steps and {delay:.2f} s, from step {first}")
        if killed and "\nstep " in job.out_path.read_text():
            self.check_start(job, expected)
        return killed

    def finish(self, run, reference):
        job, expected = self.launch(run, slow=False)
        result = job.wait()
        self.assertEqual(result.code, 0, result.describe())
        self.check_start(job, expected)
        self.assertEqual(e2e.Metrics(run).curves(), reference.curves())
        last = [r / "checkpoints" / f"step_{STEPS:08d}" for r in (self.whole, run)]
        for tensor in self.compare(*last):
            self.assertEqual(tensor["max_difference"], 0, tensor)
        self.assertEqual(self.partial_saves(run), [])

    def check_kills(self, precision, *layout):
        self.sets = [*layout, f"run.precision={precision}", f"run.steps={STEPS}",
                     f"checkpoint.every_steps={EVERY}", "evaluation.every_steps=4"]
        self.rng = random.Random(f"kills in {precision}")
        self.whole = self.folder / "whole"
        self.train(self.whole, sets=self.sets)
        reference = e2e.Metrics(self.whole)
        self.assertEqual(len(reference.steps), STEPS)
        self.assertEqual(len(reference.evaluations), STEPS // 4)

        kills = in_save = rounds = self.resumed = 0
        while kills < ARGUMENTS.kills:
            run = self.folder / f"run{rounds}"
            rounds += 1
            self.assertLess(rounds, 10 + ARGUMENTS.kills, "jobs end before they can be killed")
            # A round ends when the run is near its end, then a fresh run takes the further kills.
            while kills < ARGUMENTS.kills and e2e.last_logged_step(run) < STEPS - 6:
                left, owed = ARGUMENTS.kills - kills, ARGUMENTS.in_save - in_save
                if self.rng.random() < owed / left:
                    if self.kill_in_save(run):
                        in_save += 1
                        kills += 1
                elif self.kill_anywhere(run):
                    kills += 1
            self.finish(run, reference)
        self.assertGreaterEqual(in_save, ARGUMENTS.in_save)
        self.assertGreaterEqual(self.resumed, max(1, ARGUMENTS.kills // 2))
        print(f"{precision}: {kills} kills, {in_save} in a save, {self.resumed} jobs resumed from a "
              f"checkpoint, {rounds} runs of {STEPS} steps, each equal to the uninterrupted one",
              flush=True)

    def test_f32(self):
        self.check_kills("F32")

    def test_bf16(self):
        """With state split over ranks, each of which writes its part, and rows packed anew."""
        self.check_kills("BF16", "parallel.zero_stage=3", "parallel.strategy=EXCHANGE",
                         "parallel.placement=BALANCED", "data.packing=BALANCED")


class OtherLayoutTest(e2e.TestCase):
    def check(self, precision, loss_tolerance, weights_agree):
        """Steps 1-4 on 2 ranks, 5-8 on 1, 9-12 on 4, against all 12 on 2."""
        sets = [f"run.precision={precision}", "checkpoint.every_steps=4",
                "evaluation.every_steps=4", "data.packing=BALANCED"]
        self.train("whole", sets=[*sets, "run.steps=12"])
        self.train("run", 2, [*sets, "run.steps=4", "parallel.zero_stage=1"])
        self.train("run", 0, [*sets, "run.steps=8"])
        self.train("run", 4, [*sets, "run.steps=12", "parallel.dp=2", "parallel.cp=2",
                              "parallel.strategy=ALL_GATHER", "parallel.zero_stage=3",
                              "parallel.hybrid_shard=2"])
        got, expected = (e2e.Metrics(self.folder / run) for run in ("run", "whole"))
        self.assertEqual(len(expected.steps), 12)
        self.assertLessEqual(e2e.relative_difference(got.losses(), expected.losses()),
                             loss_tolerance)
        self.assertEqual(list(got.evaluations), list(expected.evaluations))
        self.assertLessEqual(e2e.relative_difference(got.evaluations.values(),
                                                     expected.evaluations.values()), loss_tolerance)
        last = [self.folder / r / "checkpoints" / "step_00000012" for r in ("whole", "run")]
        for tensor in self.compare(*last, "weights/"):
            self.assertTrue(weights_agree(tensor), tensor)

    def test_f64(self):
        self.check("F64", 1e-10, lambda t: t["max_difference"] <= 1e-10 * t["max"])

    def test_f32(self):
        self.check("F32", 1e-5, lambda t: t["norm_difference"] <= 1e-4 * t["norm"])


class SignalTest(e2e.TestCase):
    """INT, TERM and USR1 to launch/mpirun.sh, one after the other on one run."""

    STEPS = 7

    def shortest_step(self, run):
        return min(s["step_ms"] for s in e2e.Metrics(run).steps) / 1e3

    def reference(self, seconds):
        """An uninterrupted run whose every step takes at least `seconds`. Returns its --set values
        and its shortest step."""
        tokens = 32 * 512
        for attempt in range(8):
            probe, run = (self.folder / f"{name}{attempt}" for name in ("probe", "whole"))
            sets = [f"run.steps={self.STEPS}", f"run.global_batch_tokens={tokens}",
                    "checkpoint.every_steps=0", "evaluation.every_steps=0"]
            # Two steps tell how much larger the batch has to be.
            self.train(probe, sets=[*sets, "run.steps=2"])
            shortest = self.shortest_step(probe)
            if shortest > seconds:
                self.train(run, sets=sets)
                shortest = self.shortest_step(run)
                if shortest > seconds:
                    return sets, e2e.Metrics(run), shortest
            tokens = int(1.3 * seconds / shortest * tokens / 512 + 1) * 512
        self.fail(f"no batch makes steps of {seconds} s; the last had {tokens} tokens")

    def test_stop_save_continue(self):
        sets, expected, shortest = self.reference(ARGUMENTS.step_seconds)
        run = self.folder / "run"
        stopped_at = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            first = e2e.last_logged_step(run)
            job = self.start(self.train_arguments(run, sets), 2)
            e2e.wait_until(lambda: e2e.last_logged_step(run) > first, "a step", limit=300)
            time.sleep(0.3 * shortest)  # well inside the next step
            job.process.send_signal(number)
            result = job.wait()
            self.assertEqual(result.code, 0, result.describe())
            step = e2e.last_logged_step(run)
            self.assertEqual(step, first + 2,
                             f"{number.name}: the step that was under way is the last one")
            self.assertIn(f"stopped and saved at step {step}", result.out)
            self.assertEqual(e2e.checkpoints(run)[-1].name, f"step_{step:08d}")
            # Another job on one of the cores makes a rank slow, and it is right to say so.
            told = [line for line in result.err.splitlines() if " is slow: " not in line]
            self.assertEqual(told, [])
            stopped_at.append(step)
        result = self.run_ok(self.train_arguments(run, sets), 2)
        self.assertIn(f"done at step {self.STEPS}", result.out)
        self.assertEqual(e2e.Metrics(run).curves(), expected.curves())
        print(f"stopped at steps {stopped_at}, shortest step {shortest:.1f} s", flush=True)

    def test_stop_while_starting(self):
        """A signal during MPI's own start, long before the first step, is not lost and kills
        nobody."""
        def in_mpi():  # MPI has threads of its own
            ranks = [p.pid for p in job.processes() if p.kind == "rank"]
            return len(ranks) == 2 and all(len(os.listdir(f"/proc/{r}/task")) > 1 for r in ranks)
        run = self.folder / "run"
        job = self.start(self.train_arguments(run), 2)
        e2e.wait_until(in_mpi, "both ranks to start MPI")
        self.assertEqual(e2e.last_logged_step(run), 0)
        job.process.send_signal(signal.SIGINT)
        result = job.wait()
        self.assertEqual(result.code, 0, result.describe())
        self.assertIn("stopped and saved at step 1", result.out)
        self.assertEqual([p.name for p in e2e.checkpoints(run)], ["step_00000001"])


if __name__ == "__main__":
    PARSER.parse_known_args(namespace=ARGUMENTS)
    e2e.main(PARSER)
