"""An HTTP server with OpenAI's completions API over an engine; its libraries are the optional extra `serve`."""
