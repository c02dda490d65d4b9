"""Calls that must come, with `openai` and `anthropic`, against `nt serve` with a template that has tools.

Usage: tools_client.py BASE_URL [bare]

With `bare`, of a model that writes texts of arguments without quotes, which no length can be asked of.
"""

import json
import sys
from typing import Annotated, Literal

import anthropic
import openai
import pydantic

base = sys.argv[1]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
ask = [{"role": "user", "content": "What is the weather in Paris?"}]


City = Literal["Paris", "Oslo"] if sys.argv[2:] == ["bare"] else Annotated[str, pydantic.Field(max_length=20)]


class weather(pydantic.BaseModel):
    city: City
    days: Literal[1, 2, 3]


tool = openai.pydantic_function_tool(weather)
forced = {"type": "function", "function": {"name": "weather"}}
for choice in ["required", forced]:
    answer = client.chat.completions.parse(
        model=model, messages=ask, tools=[tool], tool_choice=choice, parallel_tool_calls=False, max_tokens=100, temperature=0
    ).choices[0]
    call = answer.message.tool_calls[0]
    assert answer.finish_reason == "tool_calls" and isinstance(call.function.parsed_arguments, weather)
    print("tool_choice", choice if choice == "required" else "weather", call.function.arguments)
chunks = client.chat.completions.create(
    model=model, messages=ask, tools=[tool], tool_choice=forced, max_tokens=100, temperature=0, stream=True
)
deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
assert deltas[0].function.name == "weather" and "".join(d.function.arguments for d in deltas) == call.function.arguments
print("streamed: the same")
flat = {"type": "function", "strict": True} | tool["function"]
answer = client.responses.create(
    model=model, input=ask, tools=[flat], tool_choice={"type": "function", "name": "weather"}, max_output_tokens=100, temperature=0
)
assert answer.output[0].type == "function_call" and json.loads(answer.output[0].arguments) == json.loads(call.function.arguments)
print("responses:", answer.output[0].name)
told = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0).messages.create(
    model=model,
    max_tokens=100,
    extra_body={"temperature": 0},
    messages=ask,
    tools=[{"name": "weather", "input_schema": tool["function"]["parameters"]}],
    tool_choice={"type": "tool", "name": "weather"},
)
assert told.stop_reason == "tool_use" and weather(**told.content[0].input)
print("anthropic:", told.content[0].name, told.content[0].input)
try:
    client.chat.completions.create(model=model, messages=ask, tools=[tool], tool_choice={"type": "function", "function": {"name": "x"}})
    raise AssertionError
except openai.BadRequestError as e:
    print(f"refused ({e.status_code}):", e.body["message"])
