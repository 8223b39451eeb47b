#!/usr/bin/env python3
"""Writes docs/configuration.md from the comments and options of configs/proto/*.proto.

    configs/make_reference.py            write the file
    configs/make_reference.py --check    exit 1 if the file differs from what would be written

Reads the subset of the proto language that those files use and stops at anything else, so that no
field can be left out unnoticed.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTOS = ["configs/proto/model.proto", "configs/proto/config.proto"]
TARGET = ROOT / "docs/configuration.md"

INTRO = """\
# Configuration reference

Written by `configs/make_reference.py` from the comments in `configs/proto`; edit those.

A configuration is a protobuf text file. `configs/quickstart.textproto` and `configs/presets` hold
complete ones, and `longspan inspect CONFIG` shows what a file means.

```
run { steps: 400 context_length: 2048 global_batch_tokens: 8192 precision: F32 }  # a comment
model {
  vocab_size: 320 hidden_size: 256 num_layers: 4 num_heads: 8 num_kv_heads: 4 ffn_hidden_size: 704
  mixer { name: "dense" softmax { causal {} } }
  mixer { name: "s2" softmax { s2 { local_blocks: 4 stride_blocks: 4 } } }
  layers: "dense s2 s2 s2"
}
data { train { path: "corpus/train" } validation { path: "corpus/validation" } }
parallel { cp: 2 }
optimizer { adamw { lr: 1e-3 } }
schedule { cosine { warmup_steps: 40 } }
```

**Checking.** A file is checked before anything is allocated. Unknown fields, absent required
values, values out of range and combinations that cannot work are reported together, one per line,
as `file:line: field: what is wrong (what would be right)`. Text that does not parse reports its
first place, as `file:line:column`.

**Overriding.** `--set path.to.field=value` changes or adds a value after the file is read; it can
be given several times. Texts need no quotes. An element of a list is addressed by its name if it
has one, else by its position from 0. Setting a field of an alternative chooses that alternative,
and an alternative without fields is chosen with `={}`:

```
--set run.steps=1000
--set data.train[0].path=/data/books
--set model.mixer[s2].softmax.s2.stride_blocks=2
--set model.mixer[s2].softmax.window.window=512
--set model.mixer[s2].softmax.causal={}
```

**Saved form.** A run keeps its configuration with every default written out as `config.textproto`
in the run directory.

In the tables, a default of *required* means that the file must give the value, and a group marked
*choice* is one of several of which exactly one is given.
"""

DECLARATION = re.compile(
    r"(?P<label>optional |repeated |)(?P<type>\w+) (?P<name>\w+) = \d+( ?\[(?P<options>.*)\])?;")
PLURALS = {"int64": "whole numbers", "double": "numbers"}
SCALARS = {"int64": "whole number", "double": "number", "bool": "true or false", "string": "text"}


class Group:
    """A message: its fields in order, enums by name, and the comment above it."""

    def __init__(self, name, comment):
        self.name, self.comment, self.fields, self.enums = name, comment, [], {}


def statements(path):
    """Yields (comment, statement) for every statement, opening and closing line of a proto file."""
    comment, pending = [], ""
    for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
        line = line.strip()
        if line.startswith("//"):
            comment.append(line[2:].strip())
        elif not line:
            comment = []
        else:
            if "//" in re.sub(r'"[^"]*"', "", line):
                sys.exit(f"{path}:{number}: a comment must stand on the lines above its field")
            pending = f"{pending} {line}".strip()
            if pending.endswith((";", "}")) or re.fullmatch(r"(message|enum|oneof) \w+ {", pending):
                yield number, " ".join(comment), pending
                comment, pending = [], ""


def parse(path, groups, enums):
    """Adds the messages and enums of one file."""
    group, oneof, enum = None, None, None
    for number, comment, text in statements(path):
        opening = re.fullmatch(r"(message|enum|oneof) (\w+) {}?", text)
        if opening and opening[1] == "message":
            group = groups[opening[2]] = Group(opening[2], comment)
            if text.endswith("{}"):
                group = None
        elif opening and opening[1] == "enum":
            enum = (group.enums if group else enums).setdefault(opening[2], [])
        elif opening:
            oneof = {"name": opening[2], "required": False}
        elif text == "}":
            if enum is not None:
                enum = None
            elif oneof is not None:
                oneof = None
            else:
                group = None
        elif text == "option (choice) = true;":
            oneof["required"] = True
        elif enum is not None:
            value = re.fullmatch(r"(\w+) = \d+;", text)
            if not value or not comment:
                sys.exit(f"{path}:{number}: needs a comment above '{text}'")
            enum.append((value[1], comment))
        elif group is not None:
            field = DECLARATION.fullmatch(text)
            if not field or not comment:
                sys.exit(f"{path}:{number}: not a field with a comment above it: '{text}'")
            group.fields.append({**field.groupdict(), "comment": comment, "oneof": oneof})
        elif not re.match(r"(syntax|package|import) ?", text):
            sys.exit(f"{path}:{number}: cannot read '{text}'")


def option(field, name):
    """Value of an option inside [...], as written, or None."""
    found = re.search(rf'\b{name} ?[:=] ?("[^"]*"|[^\s,}}\]]+)', field["options"] or "")
    return found[1].strip('"') if found else None


def allowed(field, enums):
    """The kind of value and its range."""
    if field["type"] in enums:
        return " ".join(f"`{name}`" for name, _ in enums[field["type"]])
    if field["type"] not in SCALARS:
        return "list of groups" if field["label"] == "repeated " else "group"
    least, most = option(field, "min"), option(field, "max")
    if least and most:
        bounds = [f"from {least} to {most}"]
    else:
        words = {"min": "at least", "above": "above", "max": "at most", "below": "below"}
        bounds = [f"{word} {option(field, name)}" for name, word in words.items()
                  if option(field, name)]
    limits = " and ".join(bounds)
    if field["label"] == "repeated ":
        return f"list of {PLURALS[field['type']]}, each {limits}"
    return " ".join([SCALARS[field["type"]], limits]).strip()


def default(field):
    """The value of an absent field."""
    if option(field, "required"):
        return "*required*"
    if field["oneof"] and field["oneof"]["required"]:
        return "*choice*"
    if option(field, "derived"):
        return f"`{option(field, 'derived')}`"
    return f"`{option(field, 'default')}`" if option(field, "default") else ""


def render(group, paths, groups, shared_enums, out):
    """Appends the section of one message, which is found at `paths`, and those of the messages inside
    it."""
    enums = {**shared_enums, **group.enums}
    level = "##" if "." not in paths[0] else "###"
    title = ", ".join(paths)
    out += ["", f"{level} {title}" if title else "## Top level", "", group.comment, ""]
    below = {}
    if group.fields:
        out += ["| Field | Default | Value | Meaning |", "|---|---|---|---|"]
    for field in group.fields:
        meaning = field["comment"].replace("|", "\\|")
        if field["type"] in enums:
            meaning += "".join(f" `{name}`: {text}" for name, text in enums[field["type"]])
        name = f"`{field['name']}`"
        out.append(f"| {name} | {default(field)} | {allowed(field, enums)} | {meaning} |")
        if field["type"] in groups:
            name = field["name"] + ("[]" if field["label"] == "repeated " else "")
            below.setdefault(field["type"], []).extend(f"{path}.{name}" if path else name
                                                       for path in paths)
    for name, paths_below in below.items():
        if groups[name].fields:
            render(groups[name], paths_below, groups, shared_enums, out)


def main():
    groups, enums = {}, {}
    for path in PROTOS:
        parse(path, groups, enums)
    out = [INTRO.rstrip()]
    render(groups["Config"], [""], groups, enums, out)
    text = "\n".join(out) + "\n"
    if sys.argv[1:] == ["--check"]:
        if not TARGET.exists() or TARGET.read_text() != text:
            sys.exit(f"{TARGET} is out of date: run configs/make_reference.py")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
