"""A reward for runs of a few steps: it differs between completions of any text, so that every step has a gradient."""

import zlib


def by_text(prompts, completions, **columns):
    return [zlib.crc32(completion[0]["content"].encode()) % 100 / 100 for completion in completions]
