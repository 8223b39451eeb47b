"""`longspan inspect` on each kind of target. usage: inspect_cli_test.py PROGRAM REPOSITORY"""

import math
import os
import re
import shlex
import struct

import cli_support
from cli_support import CliTest

TINY = """
run { steps: 2 context_length: 256 global_batch_tokens: 512 precision: F32 }
model {
  vocab_size: 320 hidden_size: 32 num_layers: 4 num_heads: 4 num_kv_heads: 2 ffn_hidden_size: 48
  mixer { name: "dense" softmax { causal {} } }
  mixer { name: "both" softmax { full {} } }
  mixer { name: "w" softmax { window { window: 100 sinks: 4 } } }
  mixer { name: "s2" softmax { s2 { block_size: 16 local_blocks: 2 stride_blocks: 2 } } }
  layers: "dense both w s2"
}
data { train { path: "corpus" } }
optimizer { adamw { lr: 1e-3 } }
schedule { constant {} }
checkpoint { every_steps: 1 keep_last: 2 }
"""


def preset(name):
    return os.path.join(cli_support.REPOSITORY, "configs", name)


class ConfigTest(CliTest):
    def write_tiny(self):
        with open(os.path.join(self.folder, "tiny.textproto"), "w", encoding="utf-8") as file:
            file.write(TINY)

    def test_preset(self):
        report = self.succeed_json("inspect", preset("quickstart.textproto"))
        self.assertEqual(report["kind"], "config")
        self.assertEqual(report["layers"], ["dense", "s2", "s2", "s2"])
        self.assertEqual(report["tokens_per_step"], 8192)
        # Per layer: q, o 256 x 256, k, v 128 x 256; three of 704 x 256; two norms of 256.
        layer = {"attention": 2 * 256 * 256 + 2 * 128 * 256, "feed_forward": 3 * 704 * 256}
        parts = report["parameters_by_part"]
        self.assertEqual(parts["attention"], 4 * layer["attention"])
        self.assertEqual(parts["feed_forward"], 4 * layer["feed_forward"])
        self.assertEqual(parts["norms"], 9 * 256)
        self.assertEqual(parts["embedding"], 320 * 256)
        self.assertEqual(parts["output"], 320 * 256)
        self.assertEqual(report["parameters"], sum(parts.values()))
        dense, s2 = report["mixers"]
        self.assertEqual(dense["density"], 1.0)
        self.assertEqual(dense["block_density"], 1.0)
        self.assertEqual(s2["coverage"], 1.0)
        self.assertEqual(s2["layers"], [1, 2, 3])
        self.assertEqual([head["kv_heads"] for head in s2["heads"]], [[0], [1], [2], [3]])
        self.assertAlmostEqual(report["mean_density"], (1 + 3 * s2["density"]) / 4)
        memory = report["memory_of_step"]
        held = memory["by_category"]
        self.assertEqual(sum(held.values()), memory["bytes"])
        self.assertEqual(held["optimizer"], 2 * held["gradients"])
        self.assertGreaterEqual(held["gradients"], 4 * report["parameters"])
        self.assertLess(held["gradients"], 4.5 * report["parameters"])
        half = self.succeed_json("inspect", preset("quickstart.textproto"), "--set", "run.context_length=1024")
        self.assertAlmostEqual(half["memory_of_step"]["by_category"]["activations"] / held["activations"], 0.5,
                               delta=0.1)

    def test_memory_of_ranks(self):
        """What a rank takes falls with the ranks that share tokens, and with those that share state."""
        def memory(*sets):
            arguments = [x for value in sets for x in ("--set", value)]
            return self.succeed_json("inspect", preset("quickstart.textproto"),
                                     *arguments)["memory_of_step"]["by_category"]
        one = memory("parallel.dp=1", "parallel.cp=1")
        # Pairs of category and share of what one rank takes; activations of the loss do not shrink.
        for sets, shares in (
                (["parallel.dp=1", "parallel.cp=2"], {"optimizer": 1, "activations": 0.5}),
                (["parallel.dp=2", "parallel.cp=1"], {"optimizer": 1, "activations": 1}),
                (["parallel.dp=1", "parallel.cp=2", "parallel.zero_stage=1"], {"optimizer": 0.5, "activations": 0.5}),
                (["parallel.dp=2", "parallel.cp=2", "parallel.zero_stage=3"],
                 {"optimizer": 0.25, "activations": 0.5}),
                (["parallel.dp=2", "parallel.cp=2", "parallel.zero_stage=3", "parallel.hybrid_shard=2"],
                 {"optimizer": 0.5, "activations": 0.5})):
            got = memory(*sets)
            for category, share in shares.items():
                self.assertAlmostEqual(got[category] / one[category], share, delta=0.1 * share + 0.02,
                                       msg=f"{sets} {category}")
        stages = [memory("parallel.dp=4", "parallel.cp=1", f"parallel.zero_stage={stage}") for stage in range(4)]
        whole, moments, gradients, weights = stages
        self.assertLess(moments["parameters"], 0.6 * whole["parameters"])  # f32 masters are split
        self.assertLess(gradients["gradients"], 0.6 * whole["gradients"])
        self.assertEqual(gradients["parameters"], moments["parameters"])
        self.assertLess(weights["parameters"], gradients["parameters"])
        gpu = memory("run.device=CUDA", "run.precision=BF16")
        offloaded = memory("run.device=CUDA", "run.precision=BF16", "parallel.offload_optimizer=true")
        self.assertGreater(gpu["optimizer"], 0)
        self.assertNotIn("optimizer", offloaded)
        # Sums of several micro-batches need a place of their own beside what is added to them.
        two, four = (memory("parallel.zero_stage=2", "run.micro_batch_rows=2",
                            f"run.global_batch_tokens={rows * 2048}") for rows in (2, 4))
        self.assertGreater(four["gradients"], two["gradients"])
        self.assertEqual(four["optimizer"], two["optimizer"])

    def test_every_preset(self):
        for folder in ("", "presets"):
            for name in os.listdir(preset(folder)):
                if name.endswith(".textproto"):
                    report = self.succeed_json("inspect", preset(os.path.join(folder, name)))
                    self.assertGreater(report["parameters"], 10**6, name)

    def visible(self, kind, head, q, k):
        """The patterns of TINY, written down again."""
        if kind == "both":
            return True
        if k > q or kind == "dense":
            return k <= q
        if kind == "w":
            return q - k < 100 or k < 4
        return q // 16 - k // 16 < 2 or (k // 16 + head) % 2 == 0

    def test_densities_and_pictures_against_every_pair(self):
        self.write_tiny()
        length = 200
        report = self.succeed_json("inspect", "tiny.textproto", "--length", str(length))
        self.assertEqual([m["name"] for m in report["mixers"]], ["dense", "both", "w", "s2"])
        for mixer in report["mixers"]:
            kind, pairs = mixer["name"], 0
            for head in (0, 1):
                seen = [[self.visible(kind, head, q, k) for k in range(length)]
                        for q in range(length)]
                pairs += sum(map(sum, seen))
                picture = next(h["picture"] for h in mixer["heads"] if head in h["kv_heads"])
                self.assertEqual(picture, self.draw(seen), f"{kind} {head}")
            whole = length**2 if kind == "both" else length * (length + 1) // 2
            self.assertAlmostEqual(mixer["density"], pairs / 2 / whole, msg=kind)
            self.assertEqual(mixer["visible_pairs"], pairs, kind)
            self.assertEqual(mixer["coverage"], 1.0 if kind == "s2" else None, kind)

    def static_patterns(self):
        """Each pattern's configuration, and its formula: head, query, key, in tokens."""
        def near(a, b):
            return abs(a // 16 - b // 16)
        segment = [0] * 90 + [1 + t // 40 for t in range(110)]
        return {
            "global_window { window: 30 global_tokens: 5 bidirectional: true }":
                lambda h, q, k: abs(q - k) < 30 or min(q, k) < 5,
            "power { block_size: 16 local_blocks: 2 sink_blocks: 1 }":
                lambda h, q, k: k <= q and (near(q, k) in (0, 1, 2, 4, 8) or k < 16),
            "dilated { block_size: 16 neighbours: 3 dilation: 2 bidirectional: true }":
                lambda h, q, k: near(q, k) in (0, 2, 4),
            "prefix_lm { prefix: 70 }": lambda h, q, k: k <= q or k < 70,
            "shared_question { segment: 90 segment: 40 }":
                lambda h, q, k: k <= q and segment[k] in (0, segment[q]),
            "causal_blockwise { segment: 90 segment: 40 }":
                lambda h, q, k: k <= q and segment[q] in (3, segment[k]),
            "block_causal { block_size: 32 }": lambda h, q, k: k // 32 <= q // 32,
            "random_blocks { density: 1 }": lambda h, q, k: k <= q,
            "spans { head { window: 50 sinks: 3 } head {} }":
                lambda h, q, k: k <= q and (h == 1 or q - k < 50 or k < 3),
        }

    def test_every_static_pattern_against_every_pair(self):
        patterns, length = self.static_patterns(), 200
        mixers = "".join(f'  mixer {{ name: "m{i}" softmax {{ {pattern} }} }}\n'
                         for i, pattern in enumerate(patterns))
        text = re.sub(r'  mixer \{ name: "dense".*layers: "[^"]*"\n',
                      mixers + f'  layers: "{" ".join(f"m{i}" for i in range(len(patterns)))}"\n',
                      TINY, flags=re.DOTALL).replace("num_layers: 4", f"num_layers: {len(patterns)}")
        with open(os.path.join(self.folder, "all.textproto"), "w", encoding="utf-8") as file:
            file.write(text)
        report = self.succeed_json("inspect", "all.textproto", "--length", str(length))
        self.assertEqual(len(report["mixers"]), len(patterns))
        for mixer, (pattern, visible) in zip(report["mixers"], patterns.items()):
            pairs, ahead = 0, False
            for head in (0, 1):
                seen = [[visible(head, q, k) for k in range(length)] for q in range(length)]
                pairs += sum(map(sum, seen))
                ahead = ahead or any(any(row[q + 1:]) for q, row in enumerate(seen))
                picture = next(h["picture"] for h in mixer["heads"] if head in h["kv_heads"])
                self.assertEqual(picture, self.draw(seen), f"{pattern} {head}")
            self.assertEqual(mixer["visible_pairs"], pairs, pattern)
            whole = length**2 if ahead else length * (length + 1) // 2
            self.assertAlmostEqual(mixer["density"], pairs / 2 / whole, msg=pattern)

    def draw(self, seen):
        text, n = "", len(seen)
        for q in range(0, n, 64):
            for k in range(0, n, 64):
                cell = [v for row in seen[q:q + 64] for v in row[k:k + 64]]
                text += "#" if all(cell) else "+" if any(cell) else "."
            text += "\n"
        return text

    def test_moba(self):
        """Nominal density: own block, and as many whole blocks as there are, at most 2."""
        text = TINY.replace("mixer { name: \"both\" softmax { full {} } }",
                            "mixer { name: \"both\" softmax { moba { block_size: 128 top_k: 3 } } }")
        with open(os.path.join(self.folder, "moba.textproto"), "w", encoding="utf-8") as file:
            file.write(text)
        length = 600
        report = self.succeed_json("inspect", "moba.textproto", "--length", str(length))
        mixer = report["mixers"][1]
        pairs = sum(q % 128 + 1 + 128 * min(2, q // 128) for q in range(length))
        self.assertTrue(mixer["routed"])
        self.assertEqual(mixer["visible_pairs"], 2 * pairs)
        self.assertAlmostEqual(mixer["density"], pairs / (length * (length + 1) / 2))
        self.assertEqual([head["kv_heads"] for head in mixer["heads"]], [[0, 1]])
        # '+': may be chosen.
        expected = self.draw([[k <= q if k // 128 == q // 128 else k < q and (q + k) % 2 == 0
                               for k in range(length)] for q in range(length)])
        self.assertEqual(mixer["heads"][0]["picture"], expected)
        text = self.succeed("inspect", "moba.textproto", "--length", str(length))
        self.assertIn("mixer both: moba block 128 top 3, routed", text)
        self.assertIn("its own block and at most 2 of those marked +", text)

    def test_normalization(self):
        self.write_tiny()
        sets = ["--set", "model.mixer[w].sigmoid.window={window: 100 sinks: 4}"]
        report = self.succeed_json("inspect", "tiny.textproto", *sets)
        self.assertEqual([m["normalization"] for m in report["mixers"]],
                         ["softmax", "softmax", "sigmoid", "softmax"])
        self.assertEqual([m["bias"] for m in report["mixers"]], [None, None, -math.log(256), None])
        self.assertEqual(report["mixers"][2]["pattern"], "window 100 sinks 4")
        self.assertIn(f"bias: {-math.log(256)!r}"[:18], report["resolved"])
        # It is the model's, not that of the row that is looked at.
        text = self.succeed("inspect", "tiny.textproto", *sets, "--length", "1024")
        self.assertIn("normalization   sigmoid, bias -5.54518; a score of 0 weighs 0.00389105\n", text)
        self.assertEqual(text.count("normalization"), 1)
        plain = self.succeed_json("inspect", "tiny.textproto")
        bytes_of = [r["memory_of_step"]["bytes"] for r in (report, plain)]
        self.assertLess(*bytes_of)  # no log-sum-exp is kept
        self.fail("inspect", "tiny.textproto", "--set", "model.mixer[w].sigmoid.moba={}",
                  mentions=["model.mixer[w].sigmoid.moba", "softmax only"])

    def test_text_has_density_coverage_and_picture(self):
        text = self.succeed("inspect", preset("quickstart.textproto"))
        self.assertIn("stride_blocks: 4", text)  # the resolved configuration
        self.assertIn("phase: DOCUMENT", text)  # with its defaults
        self.assertIn("density         1.0000", text)
        self.assertIn("coverage        1.0000", text)
        self.assertIn("    #...#...#...#.###+", text)

    def test_set_changes_the_pattern(self):
        change = "model.mixer[s2].softmax.s2.stride_blocks=2"
        before = self.succeed_json("inspect", preset("quickstart.textproto"))
        after = self.succeed_json("inspect", preset("quickstart.textproto"), "--set", change)
        self.assertIn("stride 2", after["mixers"][1]["pattern"])
        self.assertGreater(after["mixers"][1]["density"], before["mixers"][1]["density"] + 0.1)
        self.assertIn("stride_blocks: 2", after["resolved"])
        self.fail("inspect", preset("quickstart.textproto"), "--set",
                  "model.mixer[s2].softmax.s2.stride_blocks=5", mentions=["stride_blocks", "5"])

    def test_long_s2_rows_are_labelled(self):
        text = self.succeed("inspect", preset("quickstart.textproto"), "--length", "131072")
        self.assertIn("the first 3,072 tokens, a cell is 64 tokens", text)
        self.assertIn("131,072 tokens, a cell is about 2730 tokens", text)
        for line in text.splitlines():
            if set(line) <= set(" #+.") and line.strip():
                self.assertLessEqual(len(line.strip()), 48)

    def documentation(self):
        with open(os.path.join(cli_support.REPOSITORY, "docs", "attention.md"),
                  encoding="utf-8") as file:
            return file.read()

    def test_documented_pictures(self):
        """Every picture is what its command line draws."""
        text, checked = self.documentation(), set()
        for match in re.finditer(r"- Picture: (?:`([^`]*)`|the mixer `dense`)[^\n]*\n"
                                 r"(?:  [^\n]*\n)*\n```\n(.*?)\n```", text, re.DOTALL):
            sets, drawn = shlex.split(match[1] or ""), match[2].splitlines()
            mixer = 1 if "model.mixer[s2]" in (match[1] or "") else 0
            report = self.succeed_json("inspect", preset("quickstart.textproto"), "--length",
                                       "1024", *sets)
            panels = len(drawn[0].split())
            pictures = [h["picture"].splitlines() for h in report["mixers"][mixer]["heads"]]
            rows = ["    ".join(row) for row in zip(*pictures[:panels])]
            self.assertEqual(drawn, rows[:len(drawn)], match[1])
            self.assertIn(len(drawn), (4, 16))
            checked.add(re.search(r"softmax\.(\w+)", match[1])[1] if match[1] else "causal")
        self.assertEqual(text.count("- Picture:"), len(checked))
        kinds = {"full", "causal", "window", "global_window", "s2", "power", "dilated", "prefix_lm",
                 "shared_question", "causal_blockwise", "block_causal", "random_blocks", "spans"}
        self.assertLessEqual(kinds, checked)

    def test_documented_densities(self):
        cases = {"window 4096, 64 sinks": "dense window={window: 4096 sinks: 64}",
                 "S2, block 64, 16 local blocks, stride 8": "s2 s2={local_blocks: 16 stride_blocks: 8}",
                 "power, block 256, 5 local blocks, 1 sink": "dense power={block_size: 256 local_blocks: 5}",
                 "dilated, block 64, 16 neighbours, dilation 4": "dense dilated={neighbours: 16 dilation: 4}",
                 "shared question 1024, answers of 256": "dense shared_question={segment: [1024, 256]}",
                 "causal blockwise, segments of 1024": "dense causal_blockwise={segment: 1024}",
                 "random blocks 64, density 0.05": "dense random_blocks={density: 0.05}"}
        text = self.documentation()
        for name, case in cases.items():
            cells = re.search(rf"^\| {name} \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
            mixer, value = case.split(" ", 1)
            for length, cell in ((8192, cells[0]), (131072, cells[2])):
                report = self.succeed_json(
                    "inspect", preset("quickstart.textproto"), "--length", str(length),
                    "--set", "model.num_kv_heads=8",
                    "--set", "model.mixer[s2].softmax.s2.stride_blocks=8",
                    "--set", f"model.mixer[{mixer}].softmax.{value}")
                density = report["mixers"][0 if mixer == "dense" else 1]["density"]
                digits = len(cell.split(".")[1])
                self.assertAlmostEqual(density, float(cell), delta=0.6 * 10**-digits, msg=name)

    def test_png(self):
        self.succeed("inspect", preset("quickstart.textproto"), "--png", "p.png")
        with open(os.path.join(self.folder, "p.png"), "rb") as file:
            data = file.read()
        self.assertEqual(data[:8], b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        # Four heads side by side, two mixers, 32 cells of 12 pixels, frames of 1, margins of 12.
        self.assertEqual((width, height), (4 * (32 * 12 + 2 + 12) + 12, 2 * (32 * 12 + 2 + 12) + 12))
        self.fail("inspect", preset("quickstart.textproto"), "--png", "none/p.png",
                  mentions=["none/p.png"])

    def test_bad_target(self):
        self.fail("inspect", "nothing-here",
                  mentions=["nothing-here", "checkpoint directory", "run directory",
                            "dataset prefix", "configuration file"])
        self.fail("inspect", self.folder, mentions=[self.folder, "dataset prefix"])
        self.fail("inspect", "missing.textproto", mentions=["missing.textproto"])

    def test_useless_options_are_refused(self):
        self.fail("inspect", preset("quickstart.textproto"), "--no-verify",
                  mentions=["--no-verify"])
        self.assertEqual(
            cli_support.run("inspect", preset("quickstart.textproto"), "--length", "0").returncode,
            2)


class TrainedTest(CliTest):
    """A dataset and a run of two steps."""

    def setUp(self):
        super().setUp()
        self.texts = ["naïve text\n", "x" * 300, "third document\t"]
        os.mkdir(os.path.join(self.folder, "text"))
        for i, text in enumerate(self.texts):
            with open(os.path.join(self.folder, "text", f"{i}.txt"), "w",
                      encoding="utf-8", newline="") as file:
                file.write(text)
        self.succeed("prepare", "text", "--tokenizer", "byte", "--out", "corpus")

    def damage(self, name, offset):
        with open(os.path.join(self.folder, name), "r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    def test_dataset(self):
        lengths = [len(text.encode()) + 1 for text in self.texts]  # and the end-of-text id
        report = self.succeed_json("inspect", "corpus")
        self.assertEqual(report["kind"], "dataset")
        self.assertEqual(report["documents"], 3)
        self.assertEqual(report["sequences"], 3)
        self.assertEqual(report["tokens"], sum(lengths))
        self.assertEqual(report["dtype"], "u16")
        self.assertEqual(report["shortest_document"], min(lengths))
        self.assertEqual(report["longest_document"], max(lengths))
        self.assertAlmostEqual(report["mean_document"], sum(lengths) / 3)
        self.assertEqual(report["sidecar"]["tokenizer"], "byte")
        self.assertEqual(report["sidecar"]["fingerprint"], report["fingerprint"])
        self.assertTrue(report["sidecar_fits"])
        self.assertTrue(report["text"].startswith(self.texts[0] + "<|eot|>xxx"), report["text"])
        size = sum(os.path.getsize(os.path.join(self.folder, "corpus" + end))
                   for end in (".bin", ".idx"))
        self.assertEqual(report["verified_bytes"], size)
        text = self.succeed("inspect", "corpus")
        self.assertIn(f"verified {size} bytes", text)
        self.assertIn('"naïve text\\n', text)

    def test_damaged_dataset(self):
        self.damage("corpus.bin", 5)
        self.fail("inspect", "corpus", mentions=["corpus.bin"])
        report = self.succeed_json("inspect", "corpus", "--no-verify")
        self.assertIsNone(report["verified_bytes"])
        self.assertIsNone(report["text"])  # the flipped bit left the byte tokenizer's ids
        self.assertIn("cannot be decoded", self.succeed("inspect", "corpus", "--no-verify"))
        os.remove(os.path.join(self.folder, "corpus.idx"))
        self.fail("inspect", "corpus", mentions=["corpus.idx"])

    def test_dataset_without_sidecar(self):
        os.remove(os.path.join(self.folder, "corpus.json"))
        report = self.succeed_json("inspect", "corpus")
        self.assertIsNone(report["sidecar"])
        self.assertIsNone(report["verified_bytes"])
        self.assertIn("no sidecar", self.succeed("inspect", "corpus"))

    def test_sidecar_of_other_data(self):
        with open(os.path.join(self.folder, "text", "0.txt"), "a", encoding="utf-8") as file:
            file.write("more")
        self.succeed("prepare", "text", "--tokenizer", "byte", "--out", "other")
        os.replace(os.path.join(self.folder, "other.json"),
                   os.path.join(self.folder, "corpus.json"))
        self.fail("inspect", "corpus", mentions=["corpus.bin", "sidecar"])
        report = self.succeed_json("inspect", "corpus", "--no-verify")
        self.assertFalse(report["sidecar_fits"])

    def test_options_that_mean_nothing_for_a_dataset(self):
        for option in (["--png", "p.png"], ["--length", "64"], ["--set", "run.steps=1"]):
            self.fail("inspect", "corpus", *option, mentions=[option[0], "corpus"])

    def test_checkpoint(self):
        with open(os.path.join(self.folder, "tiny.textproto"), "w", encoding="utf-8") as file:
            file.write(TINY)
        # Full attention is for inspection only; training refuses it.
        self.succeed("train", "tiny.textproto", "--run-dir", "run", "--set",
                     "model.mixer[both].softmax.causal={}")
        step = os.path.join("run", "checkpoints", "step_00000002")
        size = sum(os.path.getsize(os.path.join(self.folder, step, name))
                   for name in os.listdir(os.path.join(self.folder, step)))
        for target in ("run", os.path.join("run", "checkpoints"), step):
            report = self.succeed_json("inspect", target)
            self.assertEqual(report["kind"], "checkpoint")
            self.assertEqual(report["step"], 2, target)
            self.assertEqual(report["verified_bytes"], size)
            self.assertEqual((report["dp"], report["cp"]), (1, 1))
        self.assertEqual(report["identity"]["run.context_length"], "256")
        self.assertEqual(report["samples_consumed"], 4)
        tensors = {t["name"]: t for t in report["tensors"]}
        embedding = tensors["weights/model.embed_tokens.weight"]
        self.assertEqual(embedding["shape"], [320, 32])
        self.assertEqual(embedding["dtype"], "f32")
        self.assertEqual(embedding["bytes"], 320 * 32 * 4)
        weights = report["totals"]["weights"]
        self.assertEqual(weights["elements"], report["config"]["parameters"])
        self.assertEqual(weights["bytes"], 4 * weights["elements"])
        self.assertEqual(len(report["config"]["mixers"]), 4)
        self.assertIn("steps: 2", report["config"]["resolved"])
        self.assertEqual(self.succeed_json("inspect", os.path.join(
            "run", "checkpoints", "step_00000001"))["step"], 1)
        text = self.succeed("inspect", "run")
        self.assertIn(f"verified {size} bytes", text)
        self.assertIn("weights/model.embed_tokens.weight", text)
        self.assertIn("f32[320, 32]", text)
        self.fail("inspect", "run", "--set", "run.steps=9", mentions=["--set", "run"])

        shard = os.path.join(step, "shard_00000.binpb")
        self.damage(shard, -100)
        self.fail("inspect", step, mentions=["shard_00000.binpb"])
        self.assertIsNone(self.succeed_json("inspect", step, "--no-verify")["verified_bytes"])
        os.remove(os.path.join(self.folder, shard))
        self.fail("inspect", step, "--no-verify", mentions=["shard_00000.binpb"])
        os.remove(os.path.join(self.folder, step, "manifest.binpb"))
        self.fail("inspect", step, mentions=["step_00000002"])


if __name__ == "__main__":
    cli_support.main()
