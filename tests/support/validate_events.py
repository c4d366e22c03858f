#!/usr/bin/env python3
"""Holds events to docs/events.schema.json by a JSON Schema validator that isn't castra's.

usage: validate_events.py SCHEMA GOLDEN PAGE DIRECTORY

GOLDEN has one sample of each fact (every other line is the embedders' encoding), PAGE the samples
of the documentation, DIRECTORY what the castras of the tests have told and kept. All of them must be
valid, be of a type the schema knows, and have no field that it doesn't know. And so that a schema
that takes anything isn't mistaken for a good one: each sample must be refused when any of its
fields is missing or has a value of another type, and taken when a later castra added a field.
"""

import collections
import json
import pathlib
import sys

from jsonschema import Draft202012Validator


def main():
    schema_path, golden, page, directory = map(pathlib.Path, sys.argv[1:])
    schema = json.loads(schema_path.read_text())
    Draft202012Validator.check_schema(schema)
    check = Check(schema)

    samples = [json.loads(line) for line in golden.read_text().splitlines()[::2]]
    for sample in samples:
        check.valid(sample, golden)
        check.sample_is_held_to(sample)
    check.later_types_are_taken()
    untried = set(check.fields) - set(check.counts)
    if untried:
        sys.exit(f"{golden}: no sample of {sorted(untried)}")

    for line in json_blocks(page.read_text()):
        event = json.loads(line)
        if "type" in event:
            check.valid(event, page)

    check.counts.clear()
    files = sorted(directory.glob("*.jsonl"))
    for path in files:
        for line in path.read_text().splitlines():
            # Python ends lines at more characters than a line feed: an event holds none of them.
            check.valid(json.loads(line), path)
    total = sum(check.counts.values())
    if not total:
        sys.exit(f"{directory}: no event to validate; did the tests run with CASTRA_TEST_EVENTS set to it?")
    for fact, count in sorted(check.counts.items()):
        print(f"{count:8}  {fact}")
    print(f"{total:8}  events of real runs are valid, {len(check.counts)} of {len(check.fields)} facts among them")


class Check:
    def __init__(self, schema):
        self.validator = Draft202012Validator(schema)
        self.counts = collections.Counter()
        envelope = set(schema["properties"])
        self.fields = {}
        for rule in schema["allOf"]:
            wanted = rule["if"]["properties"]
            if "$ref" not in rule["then"]:
                continue
            fact = "/".join(wanted[key]["const"] for key in ("type", "phase") if key in wanted)
            definition = schema["$defs"][rule["then"]["$ref"].rsplit("/", 1)[1]]
            self.fields[fact] = envelope | set(definition["properties"])

    def fact(self, event):
        phased = f"{event['type']}/{event.get('phase')}"
        return phased if phased in self.fields else event["type"]

    def valid(self, event, place):
        error = next(self.validator.iter_errors(event), None)
        if error:
            sys.exit(f"{place}: {'.'.join(map(str, error.path))}: {error.message}\n{json.dumps(event)}")
        fact = self.fact(event)
        if fact not in self.fields:
            sys.exit(f"{place}: {fact} is not in the schema\n{json.dumps(event)}")
        unknown = set(event) - self.fields[fact]
        if unknown:
            sys.exit(f"{place}: {fact} has {sorted(unknown)}, which is not in the schema\n{json.dumps(event)}")
        self.counts[fact] += 1

    def sample_is_held_to(self, sample):
        for field in sample:
            if field in ("type", "phase"):
                continue
            less = {key: value for key, value in sample.items() if key != field}
            if self.validator.is_valid(less):
                sys.exit(f"the schema takes {self.fact(sample)} without {field}")
            # No field is a list of lists, and `data` alone may be anything.
            if field != "data" and self.validator.is_valid({**sample, field: [[]]}):
                sys.exit(f"the schema takes {self.fact(sample)} with any {field}")
        if not self.validator.is_valid({**sample, "added_later": {"any": ["thing"]}}):
            sys.exit(f"the schema refuses {self.fact(sample)} with a later field")

    def later_types_are_taken(self):
        envelope = {"v": 1, "ts": "2026-11-21T10:00:00.000Z", "offset_ms": 0, "seq": 0, "run": "r"}
        later = [
            {"type": "vm.teleported", "vm": ["a", "b"]},
            {"type": "vm.lifecycle", "vm": "web", "phase": "teleported"},
            {"type": "weather"},
        ]
        for event in later:
            if not self.validator.is_valid({**event, **envelope}):
                sys.exit(f"the schema refuses a later type: {event}")
            if self.validator.is_valid(event):
                sys.exit(f"the schema takes an event without envelope: {event}")


def json_blocks(page):
    inside = False
    for line in page.splitlines():
        if line.startswith("```"):
            inside = line == "```json"
        elif inside and line.strip():
            yield line


main()
