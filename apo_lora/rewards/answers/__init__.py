"""Reading answers out of text and comparing them, without torch.

| module | what it holds |
|---|---|
| `text.py` | where in a completion the final answer stands, and what it says without its markup |
| `numbers.py` | numbers as people write them: thousands, fractions, percent, units |
| `match.py` | a final answer against the gold, as far as cheap comparison goes |
| `mathematics.py` | what only mathematics can decide, by Math-Verify, behind guards |
"""
