"""The `ollama` package, unchanged, against `nt serve`. Usage: ollama_client.py BASE_URL"""

import json
import sys
import time

import ollama

client = ollama.Client(host=sys.argv[1])
model = client.list().models[0].model
options = {"temperature": 0, "num_predict": 16}
ask = [{"role": "user", "content": "Say hello."}]
print("list:", model, "| ps:", client.ps().models[0].context_length, "| show:", client.show(model).capabilities)

whole = client.chat(model=model, messages=ask, options=options)
print("chat:", repr(whole.message.content), whole.done_reason, whole.eval_count, "tokens in", whole.eval_duration, "ns")
streamed = "".join(part.message.content for part in client.chat(model=model, messages=ask, options=options, stream=True))
assert streamed == whole.message.content
print("chat, streamed: the same text")

generated = client.generate(model=model, prompt="Say hello.", options=options)
assert generated.response == whole.message.content
print("generate: the same text")

vectors = client.embed(model=model, input=["Say hello.", "Say goodbye."])
older = client.embeddings(model=model, prompt="Say hello.")
assert list(older.embedding) == list(vectors.embeddings[0])
print("embed:", len(vectors.embeddings), "vectors of", len(vectors.embeddings[0]), "elements,", vectors.prompt_eval_count, "tokens")
cut = client.chat(model=model, messages=ask, options={"temperature": 0, "num_ctx": whole.prompt_eval_count + 4})
assert cut.done_reason == "length" and whole.message.content.startswith(cut.message.content)
print("num_ctx: ends after", cut.eval_count, "tokens")

gone = client.generate(model=model, keep_alive=0)
for _ in range(100):
    if not client.ps().models:
        break
    time.sleep(0.05)
assert gone.done_reason == "unload" and not client.ps().models
again = client.chat(model=model, messages=ask, options=options, keep_alive="5m")
assert again.message.content == whole.message.content and again.load_duration > 0
left = client.ps().models[0].expires_at.timestamp() - time.time()
print("keep_alive: gone, and loaded again for", round(left / 60), "minutes")

for work in [
    lambda: client.chat(model=model, messages=ask, format={"not": {}}),
    lambda: client.pull("llama3"),
    lambda: client.delete(model),
    lambda: client.chat(model="llama3", messages=ask),
    lambda: client.chat(model=model, messages=ask, options={"num_ctx": 131072}),
]:
    try:
        work()
        raise AssertionError("not refused")
    except ollama.ResponseError as e:
        print(f"refused ({e.status_code}):", e.error)

schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}}, "required": ["name"], "additionalProperties": False}
held = client.chat(model=model, messages=ask, format=schema, options={"temperature": 0, "num_predict": 60})
assert list(json.loads(held.message.content)) == ["name"]
print("format:", held.message.content)
