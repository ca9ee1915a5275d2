"""A chat under Unsloth on a host without a GPU: RUN IMAGE QUESTION are given, both answers printed last, as JSON."""

import io
import json
import sys

from unsloth_on_cpu import start

start()

from apo_lora.chat.chat import chat  # noqa: E402
from apo_lora.run.adapter import find_adapter  # noqa: E402

run, image, question = sys.argv[1:]
print(json.dumps([answer.text for answer in chat(find_adapter(run), question, io.StringIO(), image=image)]))
