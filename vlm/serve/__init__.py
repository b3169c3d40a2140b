"""The server: an OpenAI-compatible API and one page."""
