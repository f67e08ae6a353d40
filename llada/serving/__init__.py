"""An OpenAI-compatible server, and the page on which an answer denoises before one's eyes."""
