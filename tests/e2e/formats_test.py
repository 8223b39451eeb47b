"""A checkpoint that two ranks wrote, read by a Python program that knows only the .proto file."""

import json
import math
import subprocess
import sys

import e2e

READER = e2e.SOURCE / "tests" / "trainer" / "checkpoint" / "read_checkpoint.py"
NAME = "weights/model.layers.1.mlp.down_proj.weight"


class PythonReaderTest(e2e.TestCase):
    def read(self, checkpoint, name):
        """The reader checks every checksum, then prints the tensor."""
        done = subprocess.run([sys.executable, READER, e2e.SOURCE, checkpoint, name],
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return None, done.stderr
        head, *values = done.stdout.splitlines()
        return head, [float.fromhex(v) for v in values]

    def test_reads_what_two_ranks_wrote(self):
        self.train("run")
        checkpoint = self.folder / "run" / "checkpoints" / "step_00000006"
        self.assertEqual(sorted(p.name for p in checkpoint.iterdir()),
                         ["manifest.binpb", "shard_00000.binpb", "shard_00001.binpb"])
        head, values = self.read(checkpoint, NAME)
        self.assertEqual(head, "step 6 F32 32 64", values)
        # The same tensor as the C++ reader sees it.
        entry = {t["name"]: t for t in self.compare(checkpoint, checkpoint)}[NAME]
        self.assertEqual(len(values), entry["numel"])
        self.assertEqual(max(map(abs, values)), entry["max"])
        self.assertAlmostEqual(math.sqrt(sum(v * v for v in values)) / entry["norm"], 1, places=12)

        # One rank trains to the same weights, so the two shards were put together in order.
        self.train("one", 0)
        _, alone = self.read(self.folder / "one" / "checkpoints" / "step_00000006", NAME)
        difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(values, alone)))
        self.assertLess(difference, 1e-4 * entry["norm"])
        self.assertGreater(entry["norm"], 0.1)

        # Norm weights begin at one, and this learning rate leaves them there.
        self.train("frozen", sets=["optimizer.adamw.lr=1e-30", "run.steps=1"])
        _, ones = self.read(self.folder / "frozen" / "checkpoints" / "step_00000001",
                            "weights/model.norm.weight")
        self.assertEqual(ones, [1.0] * 32)

    def test_notices_damage(self):
        self.train("run", sets=["run.steps=1"])
        checkpoint = self.folder / "run" / "checkpoints" / "step_00000001"
        shard = checkpoint / "shard_00001.binpb"
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        head, error = self.read(checkpoint, NAME)
        self.assertIsNone(head)
        self.assertIn("checksum", error)

    def test_saved_configuration_is_usable(self):
        """config.textproto of the run directory starts the same run again."""
        self.train("run")
        self.run_ok(["train", "run/config.textproto", "--run-dir", "again"], 2)
        curves = [e2e.Metrics(self.folder / run).curves() for run in ("run", "again")]
        self.assertEqual(curves[0], curves[1])
        saved = [json.loads(self.run_ok(["inspect", f"{run}/config.textproto", "--json"]).out)
                 for run in ("run", "again")]
        self.assertEqual(saved[0]["parameters"], saved[1]["parameters"])


if __name__ == "__main__":
    e2e.main()
