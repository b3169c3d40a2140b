"""The server: an OpenAI-compatible API and one page, over one engine that batches continuously.

A request's way: `protocol` (bytes to HTTP) -> `gate` (host, key, log) -> `limits` (body caps) -> `app`
(routes) -> `messages` (parts to a conversation; `fetch` and `vlm.images` open what is untrusted) -> `engine`
-> `chat`.
"""
