"""The `openai` package, unchanged, against `nt serve`. Usage: openai_client.py BASE_URL"""

import sys
import threading
from typing import Literal

import openai
import pydantic

base = sys.argv[1]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
ask = [{"role": "user", "content": "What is the capital of France?"}]
print("models:", model)

whole = client.chat.completions.create(model=model, messages=ask, max_tokens=24, temperature=0, seed=1)
text = whole.choices[0].message.content
print("chat:", repr(text), whole.choices[0].finish_reason, whole.usage.total_tokens, "tokens")
assert text and whole.usage.prompt_tokens_details.cached_tokens is not None

stream = client.chat.completions.create(
    model=model, messages=ask, max_tokens=24, temperature=0, seed=1, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert chunks[0].choices[0].delta.role == "assistant"
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
print("stream:", len(chunks), "chunks, the same text,", chunks[-1].usage.prompt_tokens_details.cached_tokens, "tokens cached")

with client.chat.completions.stream(model=model, messages=ask, stop=[","], temperature=0) as helper:
    final = helper.get_final_completion()
print("stream helper:", repr(final.choices[0].message.content))

probable = client.chat.completions.create(
    model=model, messages=ask, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
)
print("logprobs:", [(t.token, round(t.logprob, 2), len(t.top_logprobs)) for t in probable.choices[0].logprobs.content])

several = client.chat.completions.create(model=model, messages=ask, max_tokens=6, n=2, seed=3, stop=["\n"])
print("n=2:", [c.message.content for c in several.choices])

plain = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0, logprobs=1)
print("completions:", repr(plain.choices[0].text), plain.choices[0].logprobs.tokens)

answer = client.responses.create(model=model, input="Say hello.", max_output_tokens=8, temperature=0)
print("responses:", repr(answer.output_text), answer.status)
events = list(client.responses.create(model=model, input="Say hello.", max_output_tokens=8, temperature=0, stream=True))
assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
print("responses, streamed:", events[0].type, "...", events[-1].type)

similar = client.embeddings.create(model=model, input=["A cat sits on the mat.", "A cat is sitting on a mat.", "Shares fell by 3 %."])
dot = lambda i, j: sum(a * b for a, b in zip(similar.data[i].embedding, similar.data[j].embedding))
as_numbers = client.embeddings.create(model=model, input="A cat sits on the mat.", encoding_format="float")
assert max(abs(a - b) for a, b in zip(as_numbers.data[0].embedding, similar.data[0].embedding)) < 1e-6
assert dot(0, 1) > dot(0, 2)
print("embeddings:", len(similar.data[0].embedding), "elements;", round(dot(0, 1), 3), "and", round(dot(0, 2), 3), similar.usage)


def refused(error, **more):
    try:
        client.chat.completions.create(**({"model": model, "messages": ask, "max_tokens": 4} | more))
    except error as e:
        print(f"refused ({e.status_code}):", e.body["message"])
        return
    raise AssertionError(more)


tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
refused(openai.NotFoundError, model="gpt-5")
refused(openai.BadRequestError, temperature=1000)
refused(openai.BadRequestError, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})
refused(openai.BadRequestError, tools=[tool])
refused(openai.BadRequestError, messages=[{"role": "user", "content": "word " * 20000}])


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    continent: Literal["Africa", "America", "Asia", "Europe", "Oceania"]
    capital: bool


parsed = client.chat.completions.parse(model=model, messages=ask, response_format=City, max_tokens=80, temperature=0)
assert isinstance(parsed.choices[0].message.parsed, City)
print("parse:", parsed.choices[0].message.parsed)
with client.chat.completions.stream(model=model, messages=ask, response_format=City, max_tokens=80, temperature=0) as helper:
    assert helper.get_final_completion().choices[0].message.parsed == parsed.choices[0].message.parsed
answer = client.responses.parse(model=model, input=ask, text_format=City, max_output_tokens=80, temperature=0)
assert answer.output_parsed == parsed.choices[0].message.parsed
print("responses.parse: the same")
cut = client.chat.completions.create(
    model=model, messages=ask, response_format={"type": "json_object"}, max_tokens=3, temperature=0
).choices[0]
print("json_object, cut:", repr(cut.message.content), cut.finish_reason)
assert cut.finish_reason == "length" and cut.message.content.startswith("{")
for body in [{"grammar": 'root ::= "yes" | "no"'}, {"guided_choice": ["yes", "no"]}, {"guided_regex": "yes|no"}]:
    told = client.chat.completions.create(model=model, messages=ask, extra_body=body).choices[0].message.content
    assert told in ["yes", "no"], told

# A client that goes away in the middle, and those behind it.
gone = client.chat.completions.create(model=model, messages=ask, max_tokens=2000, stream=True, logit_bias={"2": -100})
next(iter(gone))
gone.close()
texts = []
again = lambda: texts.append(
    client.chat.completions.create(model=model, messages=ask, max_tokens=24, temperature=0).choices[0].message.content
)
threads = [threading.Thread(target=again) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert texts == [text] * 4
print("cancelled, then 4 at once: the same text")
