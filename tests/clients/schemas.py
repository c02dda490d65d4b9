"""Schemas of JSON-Schema-Test-Suite, asked of `nt serve`; each answer is validated with `jsonschema`.

Usage: schemas.py BASE_URL SUITE [--count N] [--seed S] [--tokens N]

SUITE is the folder `json/tests/draft2020-12` of the package's source. The process fails if an answer that is whole does
not conform, or a refusal has no reason.
"""

import argparse
import collections
import decimal
import json
import pathlib
import random
import urllib.error
import urllib.request

import jsonschema

args = argparse.ArgumentParser()
args.add_argument("base")
args.add_argument("suite", type=pathlib.Path)
args.add_argument("--count", type=int, default=200)
args.add_argument("--seed", type=int, default=1)
args.add_argument("--tokens", type=int, default=200)
args = args.parse_args()

groups = []
for path in sorted(args.suite.glob("*.json")):
    for group in json.loads(path.read_text()):
        groups.append((f"{path.stem}: {group['description']}", group["schema"]))
chosen = random.Random(args.seed).sample(groups, min(args.count, len(groups)))


def answer(schema, seed):
    body = {
        "messages": [{"role": "user", "content": "Write an example."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "example", "schema": schema}},
        "max_tokens": args.tokens,
        "temperature": 1.0,
        "seed": seed,
    }
    request = urllib.request.Request(
        f"{args.base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


valid, cut, wrong = 0, 0, []
refused = collections.Counter()
for i, (name, schema) in enumerate(chosen):
    status, reply = answer(schema, i)
    if status == 400:
        message = reply["error"]["message"].split("cannot be followed: ")[-1]
        refused[message] += 1
        continue
    if status != 200:
        wrong.append((name, schema, f"status {status}: {reply}"))
        continue
    choice = reply["choices"][0]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        cut += 1
        continue
    try:
        # In decimals, since a double is seldom a multiple of 0.0001.
        exact = [json.loads(t, parse_float=decimal.Decimal) for t in (json.dumps(schema), text)]
        jsonschema.Draft202012Validator(exact[0]).validate(exact[1])
        valid += 1
    except Exception as e:
        wrong.append((name, schema, f"{text!r}: {type(e).__name__}: {str(e).splitlines()[0]}"))

for name, schema, what in wrong:
    print(f"WRONG {name}\n  {json.dumps(schema)}\n  {what}")
for message, n in sorted(refused.items(), key=lambda item: -item[1]):
    print(f"{n:4} refused: {message[:150]}")
print(
    f"{len(chosen)} of {len(groups)} schemas (seed {args.seed}): {valid} answers conform, {cut} were cut by max_tokens "
    f"{args.tokens}, {sum(refused.values())} schemas were refused by name, {len(wrong)} answers are wrong"
)
raise SystemExit(bool(wrong))
