"""The `anthropic` package, unchanged, against `nt serve`. Usage: anthropic_client.py BASE_URL"""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
model = client.models.list().data[0].id
ask = {"model": model, "max_tokens": 24, "extra_body": {"temperature": 0}, "messages": [{"role": "user", "content": "Say hello."}]}

whole = client.messages.create(system="You are brief.", **ask)
print("messages:", repr(whole.content[0].text), whole.stop_reason, whole.usage.input_tokens, whole.usage.output_tokens)

with client.messages.stream(system="You are brief.", **ask) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert text == whole.content[0].text == final.content[0].text
print("stream:", final.stop_reason, final.usage.cache_read_input_tokens, "tokens cached")

counted = client.messages.count_tokens(model=model, system="You are brief.", messages=ask["messages"])
assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
print("count_tokens:", counted.input_tokens)

begun = [*ask["messages"], {"role": "assistant", "content": "Hello, my name"}]
print("goes on:", repr(client.messages.create(**(ask | {"messages": begun, "max_tokens": 8})).content[0].text))

try:
    client.messages.create(**ask, tools=[{"name": "weather", "input_schema": {"type": "object"}}])
    raise AssertionError("tools")
except anthropic.BadRequestError as e:
    print(f"refused ({e.status_code}):", e.body["error"]["message"])
