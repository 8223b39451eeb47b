"""Reads a Longspan checkpoint with nothing but generated protobuf classes and XXH3.

Usage: read_checkpoint.py PROTO_ROOT CHECKPOINT TENSOR

PROTO_ROOT is the repository: trainer/checkpoint/checkpoint.proto is compiled from it. Checks the
manifest, every record of every shard file, and prints the named tensor: first its dtype and shape,
then one value a line.

Needs Debian's protobuf-compiler, python3-protobuf and python3-xxhash.
"""

import importlib
import pathlib
import struct
import subprocess
import sys
import tempfile

import xxhash

# struct codes of the element types; bf16 is widened below.
CODES = {"F32": "f", "F64": "d", "I32": "i", "I64": "q", "U8": "B", "BF16": "H"}


def load_schema(proto_root):
    out = tempfile.mkdtemp()
    subprocess.run(
        ["protoc", f"--proto_path={proto_root}", f"--python_out={out}",
         "trainer/checkpoint/checkpoint.proto"],
        check=True,
    )
    sys.path.insert(0, out)
    return importlib.import_module("trainer.checkpoint.checkpoint_pb2")


def read_varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def check(condition, what):
    if not condition:
        sys.exit(f"read_checkpoint.py: {what}")


def main():
    proto_root, checkpoint, wanted = sys.argv[1:]
    schema = load_schema(proto_root)
    directory = pathlib.Path(checkpoint)

    envelope = schema.Envelope.FromString((directory / "manifest.binpb").read_bytes())
    check(xxhash.xxh3_64_intdigest(envelope.manifest) == envelope.xxh3, "manifest checksum")
    manifest = schema.Manifest.FromString(envelope.manifest)
    check(manifest.format_version == 1, "format version")

    # Every record of every file, as the framing says.
    records = {}
    for index, file in enumerate(manifest.files):
        data = (directory / file.name).read_bytes()
        check(len(data) == file.bytes, f"size of {file.name}")
        at = 0
        while at < len(data):
            length, start = read_varint(data, at)
            record = schema.ShardRecord.FromString(data[start : start + length])
            end = start + length
            offset = end - len(record.payload)
            records[index, offset] = (record, xxhash.xxh3_64_intdigest(data[at:offset]), at)
            at = end

    tensor_bytes = {}
    for tensor in manifest.tensors:
        parts = []
        for shard in tensor.shards:
            record, frame_xxh3, frame_offset = records.pop((shard.file, shard.offset))
            check(record.tensor == tensor.name, "record's tensor")
            check((record.begin, record.end) == (shard.begin, shard.end), "record's range")
            check(frame_offset == shard.frame_offset, "frame offset")
            check(frame_xxh3 == shard.frame_xxh3, "frame checksum")
            check(xxhash.xxh3_64_intdigest(record.payload) == shard.xxh3, "payload checksum")
            parts.append(record.payload)
        tensor_bytes[tensor.name] = b"".join(parts)
    check(not records, "records that the manifest does not know")

    tensor = next(t for t in manifest.tensors if t.name == wanted)
    dtype = schema.ElementType.Name(tensor.dtype)
    data = tensor_bytes[wanted]
    count = len(data) // struct.calcsize(CODES[dtype])
    values = struct.unpack(f"<{count}{CODES[dtype]}", data)
    if dtype == "BF16":
        values = struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(v << 16 for v in values)))
    print("step", manifest.step, dtype, *tensor.shape)
    for value in values:
        print(value.hex() if isinstance(value, float) else value)


if __name__ == "__main__":
    main()
