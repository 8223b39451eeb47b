"""What goes wrong in a job ends it: within its time limit, with a sentence that names the cause and
the rank, and with the last checkpoint intact. A rank that is only slow is named and nothing else."""

import os
import re
import signal
import statistics

import e2e

TIMEOUT = 3  # parallel.timeout_s
# An operation that comes some steps after the first checkpoint.
OPERATION = 400


class FaultTest(e2e.TestCase):
    SETS = ["run.steps=100000", "checkpoint.every_steps=2", "evaluation.every_steps=0",
            f"parallel.timeout_s={TIMEOUT}"]

    def check_run(self, run):
        """What was committed is whole, and the run goes on from the newest of it."""
        found = e2e.checkpoints(run)
        self.assertGreater(len(found), 0)
        for path in found:
            self.run_ok(["inspect", path, "--json"])
        newest = int(found[-1].name[5:])
        done = self.train(run, sets=["evaluation.every_steps=0", f"run.steps={newest + 1}"])
        self.assertIn(f"resuming from {found[-1]}", done.out)
        self.assertEqual(len(e2e.Metrics(run).steps), newest + 1)

    def failed(self, run, fault, ranks):
        """A job of two ranks, processes or threads, with a fault."""
        extra = ["--fault", fault, *([] if ranks else ["--local-ranks", "2"])]
        result = self.start(self.train_arguments(run, self.SETS, extra), ranks).wait(limit=240)
        self.assertNotEqual(result.code, 0, result.describe())
        return result

    def test_a_killed_rank(self):
        for victim in (0, 1):
            with self.subTest(victim=victim):
                run = self.folder / f"run{victim}"
                job = self.start(self.train_arguments(run, self.SETS), 2)
                e2e.wait_until(lambda: e2e.checkpoints(run), "a checkpoint")
                process, = [p for p in job.processes() if p.rank == victim]
                os.kill(process.pid, signal.SIGKILL)
                result = job.wait(limit=60)
                self.assertNotEqual(result.code, 0, result.describe())
                self.assertRegex(result.err, rf"rank {1 - victim}\b.*rank {victim} \(process "
                                             rf"{process.pid} on this host\) has ended")
                self.check_run(run)

    def test_a_lost_message(self):
        result = self.failed("run", f"lose:1:{OPERATION}", 2)
        self.assertRegex(result.err, rf"longspan: error(?: on rank 0)?: \w+ \(operation \d+.*\) on "
                                     rf"rank 0 of 2.* is not complete after {TIMEOUT} s: "
                                     r"(its messages with|not issued by) rank 1 of the job\b")
        self.check_run(self.folder / "run")

    def test_a_rank_that_hangs(self):
        job = self.start(self.train_arguments("run", self.SETS), 2)
        e2e.wait_until(lambda: e2e.checkpoints(self.folder / "run"), "a checkpoint")
        process, = [p for p in job.processes() if p.rank == 1]
        os.kill(process.pid, signal.SIGSTOP)
        result = job.wait(limit=60)
        self.assertNotEqual(result.code, 0, result.describe())
        self.assertRegex(result.err, rf" on rank 0 of 2.* is not complete after {TIMEOUT} s: "
                                     r"(its messages with|no answer from) rank 1 of the job\b")
        self.check_run(self.folder / "run")

    def test_a_lost_message_between_threads(self):
        result = self.failed("run", f"lose:1:{OPERATION}", 0)
        self.assertEqual(result.code, 2, result.describe())
        self.assertRegex(result.err, rf"longspan: error: rank 0 of 2 waited {TIMEOUT} s for \w+.* "
                                     r"\(operation \d+\); not issued by rank 1\n")
        self.check_run(self.folder / "run")

    def test_a_rank_that_fails(self):
        """Its own error is what is told, whatever becomes of the ranks that wait for it."""
        says = rf"rank 1 fails at \w+ \(operation {OPERATION}\)"
        processes = self.failed("run", f"throw:1:{OPERATION}", 2)
        self.assertRegex(processes.err, "longspan: error on rank 1: " + says)
        threads = self.failed("threads", f"throw:1:{OPERATION}", 0)
        self.assertRegex(threads.err, "longspan: error: " + says)
        self.check_run(self.folder / "run")

    def test_a_slow_rank(self):
        self.check_slow_rank("rings", ["run.global_batch_tokens=512"])

    def test_a_slow_rank_with_sharded_gradients(self):
        """The others wait for it in the middle of their backward passes."""
        self.check_slow_rank("shards", ["parallel.dp=2", "parallel.cp=1", "parallel.zero_stage=2",
                                        "run.global_batch_tokens=1024"])

    def check_slow_rank(self, run, layout):
        sets = [*layout, "run.steps=8", "checkpoint.every_steps=0", "evaluation.every_steps=0"]
        self.train(run, sets=sets)
        expected = e2e.Metrics(self.folder / run)
        # Four to ten operations a step before its last sum, each of which waits for as long as a step
        # takes on this machine.
        delay = max(0.06, statistics.median(s["step_ms"] for s in expected.steps) / 1e3)
        slow = self.train("slow", sets=sets, extra=["--fault", f"delay:1:0:{delay:.3f}"])
        self.assertEqual(e2e.Metrics(self.folder / "slow").curves(), expected.curves())
        warnings = re.findall(r"rank (\d) on host (\S+) is slow: it computes (\S+) s in a step, the "
                              r"other ranks (\S+) s \(median\)", slow.err)
        self.assertEqual(len(warnings), 1, slow.describe())
        rank, host, own, others = warnings[0]
        self.assertEqual((rank, host), ("1", os.uname().nodename))
        self.assertGreater(float(own), 3 * float(others))
        self.assertGreater(float(own), 3 * delay)

    def test_faults_are_checked(self):
        result = self.start(self.train_arguments("run", (), ["--fault", "lose:1"]), 2).wait()
        self.assertEqual(result.code, 2, result.describe())
        self.assertRegex(result.err, '^longspan: error: "lose:1" is no fault .*\n$')
        result = self.start(self.train_arguments("run", (), ["--fault", "throw:2:0"]), 2).wait()
        self.assertEqual((result.code, result.err),
                         (2, "longspan: error: --fault throw:2:0: there is no rank 2 in a job of 2 ranks\n"))


if __name__ == "__main__":
    e2e.main()
