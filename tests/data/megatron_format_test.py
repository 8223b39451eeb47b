"""Reader and writer against an independent description of the Megatron .idx/.bin format.

usage: megatron_format_test.py DATASET_TOOL
"""
import os
import struct
import subprocess
import sys
import tempfile
import unittest

TOOL = sys.argv.pop()
CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def build(documents, code):
    """documents: lists of sequences, which are lists of token ids. Returns (.idx, .bin)."""
    sequences = [s for document in documents for s in document]
    size = struct.calcsize(CODES[code])
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1)
    idx += struct.pack("<%di" % len(sequences), *[len(s) for s in sequences])
    at = 0
    for s in sequences:
        idx += struct.pack("<q", at)
        at += size * len(s)
    count = 0
    idx += struct.pack("<q", 0)
    for document in documents:
        count += len(document)
        idx += struct.pack("<q", count)
    tokens = b"".join(struct.pack("<%d%s" % (len(s), CODES[code]), *s) for s in sequences)
    return idx, tokens


def parse(idx, tokens):
    """The other way round; returns (documents, code)."""
    assert idx[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, entries = struct.unpack_from("<QBQQ", idx, 9)
    assert version == 1
    lengths = struct.unpack_from("<%di" % sequences, idx, 34)
    offsets = struct.unpack_from("<%dq" % sequences, idx, 34 + 4 * sequences)
    ends = struct.unpack_from("<%dq" % entries, idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * entries
    assert ends[0] == 0 and ends[-1] == sequences
    read = [list(struct.unpack_from("<%d%s" % (n, CODES[code]), tokens, at))
            for n, at in zip(lengths, offsets)]
    assert sum(lengths) * struct.calcsize(CODES[code]) == len(tokens)
    return [read[a:b] for a, b in zip(ends, ends[1:])], code


class MegatronFormatTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.prefix = os.path.join(self.folder.name, "set")

    def tearDown(self):
        self.folder.cleanup()

    def tool(self, *arguments, text=""):
        return subprocess.run([TOOL, *arguments], input=text, capture_output=True, text=True)

    def write_files(self, idx, tokens):
        for suffix, content in ((".idx", idx), (".bin", tokens)):
            with open(self.prefix + suffix, "wb") as f:
                f.write(content)

    def test_reader(self):
        documents = [[[1, 2, 3]], [[4], [5, 6]], [], [[7, 0], [], [100]]]
        expected = [" ".join(str(t) for s in d for t in s) for d in documents]
        for code in CODES:
            self.write_files(*build(documents, code))
            done = self.tool("read", self.prefix)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout.split("\n")[:-1], expected, code)

    def test_reader_takes_the_limits_of_each_type(self):
        for code, low, high in ((1, 0, 255), (2, -128, 127), (3, -32768, 32767),
                                (4, -2**31, 2**31 - 1), (5, -2**31, 2**31 - 1), (8, 0, 65535)):
            self.write_files(*build([[[low, high]]], code))
            self.assertEqual(self.tool("read", self.prefix).stdout, "%d %d\n" % (low, high))

    def test_writer(self):
        documents = [[1, 2, 3], [4], list(range(1000, 1007)), [65499]]
        text = "".join(" ".join(map(str, d)) + "\n" for d in documents)
        for vocabulary, code in ((65499, 8), (65500, 4)):
            for longest in (1000, 3, 1):
                done = self.tool("write", self.prefix, str(vocabulary), str(longest), text=text)
                self.assertEqual(done.returncode, 0, done.stderr)
                with open(self.prefix + ".idx", "rb") as i, open(self.prefix + ".bin", "rb") as b:
                    read, found = parse(i.read(), b.read())
                self.assertEqual(found, code)
                self.assertEqual([[t for s in d for t in s] for d in read], documents)
                self.assertEqual([len(d) for d in read],
                                 [-(-len(d) // longest) for d in documents])

    def test_damage_is_refused(self):
        idx, tokens = build([[[1, 2, 3]], [[4]]], 8)
        self.write_files(idx[:-1], tokens)
        done = self.tool("read", self.prefix)
        self.assertEqual(done.returncode, 1)
        self.assertIn("truncated", done.stderr)


if __name__ == "__main__":
    unittest.main()
