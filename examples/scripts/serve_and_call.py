"""Serve a model on a free port, and ask it by the package openai."""

import socket
import subprocess
import sys

from openai import OpenAI

with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
command = [sys.executable, "-m", "fewbit", "serve", sys.argv[1], "--port", str(port), "--served-model-name", "mine"]
with subprocess.Popen(command) as server:
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=20)
        messages = [{"role": "user", "content": "What is a garden?"}]
        answer = client.chat.completions.create(model="mine", messages=messages, max_tokens=12, temperature=0)
        print(answer.choices[0].message.content)
    finally:
        server.terminate()
