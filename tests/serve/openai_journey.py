"""What a program does with the official client; run by test_clients.py under each major version of it.

python openai_journey.py http://127.0.0.1:8000 data:image/png;base64,...
"""

import sys

import openai

url, picture = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is it?"}]
request = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 4}

assert [model.id for model in client.models.list()] == ["model"]
whole = client.chat.completions.create(**request, logprobs=True)
assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.content) == 4
chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert said == whole.choices[0].message.content, (said, whole)
assert chunks[-1].usage == whole.usage
several = client.chat.completions.create(**request, n=2, temperature=1.2, top_p=0.9, seed=3, stop=["zebra"])
assert [choice.index for choice in several.choices] == [0, 1]

bad = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
]
for change, error, code in (
    ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
    ({"messages": bad}, openai.BadRequestError, "invalid_image"),
    (
        {"messages": [{"role": "user", "content": "word " * 5000}]},
        openai.BadRequestError,
        "context_length_exceeded",
    ),
    ({"temperature": 9}, openai.UnprocessableEntityError, "invalid_request"),
    ({"n": 5}, openai.UnprocessableEntityError, "invalid_request"),
    ({"logit_bias": {"1": 2}}, openai.BadRequestError, "unsupported_parameter"),
):
    try:
        client.chat.completions.create(**{**request, **change})
    except error as caught:
        assert caught.code == code, caught
    else:
        raise AssertionError(f"{change} was accepted")
print(f"openai {openai.__version__}: fine")
