"""The `openai` package, unchanged, against `nt serve` of two models. Usage: models_client.py BASE_URL"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
models = [model.id for model in client.models.list().data]
print("models:", ", ".join(models))


def ask(model):
    """The text of a model, which says that it is its own."""
    answer = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0)
    assert answer.model == model, answer
    return answer.choices[0].text


texts = {model: ask(model) for model in models}
print("texts:", texts)
with ThreadPoolExecutor(8) as pool:
    asked = [models[i % 2] for i in range(16)]
    assert list(pool.map(ask, asked)) == [texts[model] for model in asked]
print("16 at once, in turn: the same texts")

both = client.completions.create(model=models[0], prompt=["The capital of France is", "One, two,"], max_tokens=8, temperature=0)
assert [choice.index for choice in both.choices] == [0, 1] and both.choices[0].text == texts[models[0]]
print("two prompts:", [choice.text for choice in both.choices])
begun = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello, my name"}]
more = {"continue_final_message": True, "add_generation_prompt": False, "min_tokens": 8}
answer = client.chat.completions.create(model=models[1], messages=begun, max_tokens=8, temperature=0, extra_body=more)
print("goes on:", repr(answer.choices[0].message.content), answer.usage.completion_tokens, "tokens")

try:
    ask("third")
    raise AssertionError("a model that is not there")
except openai.NotFoundError as e:
    print(f"refused ({e.status_code}):", e.body["message"])
